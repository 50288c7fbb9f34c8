"""The trainer's flat arrays and PyTorch's parameters: which part of one is which of the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Flat = NDArray[np.float32]

_PROMPT, _PREFIX = "prompt_embeddings", ".prefix"
_EMBEDDINGS = "prompt_encoder.default.embedding.weight"  # PEFT's, of prompts and prefixes


class Slot(NamedTuple):
    """A named tensor of the trainer: where it lies in its flat array, and in which parameter.

    `columns` is set where it is a part of the parameter's columns (one layer of PEFT's prefix);
    `turned` where the parameter is its transpose (a Conv1D's weight).
    """

    name: str
    flat: int
    offset: int
    shape: tuple[int, ...]
    decay: bool
    parameter: nn.Parameter
    columns: slice | None
    turned: bool

    def view(self, tensor: Tensor) -> Tensor:
        """This slot's part, as the trainer has it, of a tensor of the parameter's shape."""
        if self.columns is not None:
            tensor = tensor[:, self.columns]
        return tensor.T if self.turned else tensor


class Slots:
    """All slots of a model; parameters that have one are trained, in float32, and no others.

    Raises RuntimeError where model and trainer differ in what is trained.
    """

    def __init__(self, model: nn.Module, outline: Mapping[str, Any]) -> None:
        self.lengths = [one["elements"] for one in outline["parameters"]]
        found = _by_name(model)
        self.slots: list[Slot] = []
        layers = 0
        for flat, one in enumerate(outline["parameters"]):
            for part in one["segments"]:
                name, shape = part["name"], tuple(part["shape"])
                columns = None
                if name.endswith(_PREFIX):
                    columns = slice(layers * shape[1], (layers + 1) * shape[1])
                    layers += 1
                own = _EMBEDDINGS if name == _PROMPT or name.endswith(_PREFIX) else name
                if own not in found:
                    raise RuntimeError(f"the PyTorch model has no parameter for {name}")
                parameter, turned = found[own]
                slot = Slot(
                    name, flat, part["offset"], shape, part["decay"], parameter, columns, turned
                )
                if slot.view(parameter).numel() != np.prod(shape):
                    raise RuntimeError(
                        f"{name} is {list(shape)}, in PyTorch {list(parameter.shape)}"
                    )
                self.slots.append(slot)
        self.parameters = list({id(slot.parameter): slot.parameter for slot in self.slots}.values())
        trained = {id(parameter) for parameter in self.parameters}
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in trained)
            if id(parameter) in trained:
                parameter.data = parameter.data.float()

    def name_of(self, parameter: nn.Parameter) -> str:
        return next(slot.name for slot in self.slots if slot.parameter is parameter)

    def groups(self) -> list[tuple[bool, list[nn.Parameter]]]:
        """The parameters with weight decay, and those without."""
        decays = {id(slot.parameter): slot.decay for slot in self.slots}
        parts = [
            (decay, [one for one in self.parameters if decays[id(one)] is decay])
            for decay in (True, False)
        ]
        return [(decay, parameters) for decay, parameters in parts if parameters]

    def read(self, tensor_of: Callable[[nn.Parameter], Tensor]) -> list[Flat]:
        """The trainer's arrays of a tensor that each parameter has."""
        arrays = [np.zeros(length, np.float32) for length in self.lengths]
        for slot in self.slots:
            part = slot.view(tensor_of(slot.parameter).detach()).reshape(-1)
            size = part.numel()
            arrays[slot.flat][slot.offset : slot.offset + size] = part.cpu().numpy()
        return arrays

    @torch.no_grad()
    def write(self, arrays: Sequence[Flat], tensor_of: Callable[[nn.Parameter], Tensor]) -> None:
        """Overwrites a tensor of each parameter with the trainer's arrays."""
        for slot in self.slots:
            view = slot.view(tensor_of(slot.parameter).detach())
            part = arrays[slot.flat][slot.offset : slot.offset + view.numel()]
            view.copy_(torch.tensor(part).reshape(view.shape))


def _by_name(model: nn.Module) -> dict[str, tuple[nn.Parameter, bool]]:
    """The parameters by their names in the base model, and whether they are Conv1Ds'."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.pytorch_utils import Conv1D

    prefix = ""
    if isinstance(model, PeftModel):
        prefix = "base_model.model." if isinstance(model.base_model, BaseTuner) else "base_model."
    turned = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
    }
    found = {}
    for name, parameter in model.named_parameters():
        own = name.removeprefix(prefix)
        if own != _EMBEDDINGS:
            own = own.replace(".modules_to_save.default.", ".").replace(".default.", ".")
            own = own.removesuffix(".default")
        found[own] = (parameter, name in turned)
    return found
