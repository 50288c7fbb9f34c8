"""A frozen linear layer in 4 bits."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import ops
from ..ops.autograd import no_autocast
from . import bnb, checkpoint
from .parts import alike, held_as, kind_of, unset

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_BUFFERS = ("absmax", "nested_absmax", "nested_code", "nested_offset")


class Linear4bit(nn.Module):
    """``y = x·Wᵀ + bias`` with W ``[out_features, in_features]`` frozen in 4 bits an element.

    The weight has bitsandbytes' format and the values that its dequantisation gives, bit for bit;
    the backward pass dequantises again and keeps no dense copy. State dicts have bitsandbytes'
    names, both ways: ``weight``, ``weight.absmax``, ``weight.quant_map``, ``weight.nested_absmax``,
    ``weight.nested_quant_map``, ``weight.quant_state.bitsandbytes__nf4``. A state dict with a
    dense ``weight`` is quantised as it is loaded.

    ``to(dtype)`` changes the type of ``bias`` alone. The parts of the weight beside its codes are
    buffers: ``DistributedDataParallel(..., broadcast_buffers=False)`` spares their broadcast at
    every forward.

    Args:
        in_features: k.
        out_features: n.
        bias: whether there is a bias ``[n]``, trainable as in ``nn.Linear``.
        device: where the weight is.
        dtype: type of the values that are quantised, and of ``bias``: float32, float16, bfloat16.
        quant_type: "nf4" or "fp4".
        blocksize: elements that share an absmax: 32 to 4096, a power of two.
        double_quant: quantises the absmax too, to 8 bits in blocks of 256.
        compute_dtype: type of the product, x's own unless given, under autocast too; y has x's
            type always.
        quant_storage: type as which the packed bytes are held, changing no bit of them: FSDP wants
            that of the other parameters.

    Shapes: x ``[..., in_features]``, y ``[..., out_features]``, ``weight``
    ``[ceil(n·k / 2 / bytes of quant_storage), 1]``.

    Raises ``ValueError`` or ``TypeError`` for a size, type or block size that is not among these.
    """

    in_features: int
    out_features: int
    weight: nn.Parameter
    bias: nn.Parameter | None
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if in_features < 1 or out_features < 1:
            raise ValueError(f"needs features, not in {in_features} and out {out_features}")
        for name, kind in (("dtype", dtype), ("compute_dtype", compute_dtype)):
            if kind is not None and kind not in _FLOATS:
                raise TypeError(f"{name} must be float32, float16 or bfloat16, not {kind}")
        if quant_storage not in (torch.uint8, *_FLOATS):
            raise TypeError(
                f"quant_storage must be uint8, float32, float16 or bfloat16, not {quant_storage}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype, self.quant_storage = compute_dtype, quant_storage
        quant = unset(
            (out_features, in_features), quant_type, blocksize, double_quant, device, dtype
        )
        quant.check()
        self._store(quant)
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        if not self.weight.is_meta:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s own initialisation, quantised."""
        shape = (self.out_features, self.in_features)
        dense = torch.empty(shape, device=self.weight.device, dtype=self.dtype)
        nn.init.kaiming_uniform_(dense, a=math.sqrt(5))
        self._store(self._quantized(dense))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
    ) -> Linear4bit:
        """A layer with the weight of ``linear`` and its very bias.

        ``linear`` is an ``nn.Linear``, whose weight is quantised, or a ``Linear4bit`` of
        bitsandbytes' or our own, whose tensors and settings are used as they are, without a copy:
        no keyword argument but ``compute_dtype`` applies to it.

        Raises ``TypeError`` for another layer, and ``ValueError`` if its quant state does not fit.
        """
        own = isinstance(linear, Linear4bit)
        quant = linear.quant if isinstance(linear, Linear4bit) else bnb.view(linear)
        if quant is None and not isinstance(linear, nn.Linear):
            raise TypeError(
                f"from_linear takes an nn.Linear or a Linear4bit, not {kind_of(linear)}"
            )
        source: Any = linear
        if quant is not None:
            quant_storage = quant.packed.dtype
        else:
            settings: dict[str, Any] = bnb.settings(linear) or {
                "quant_type": quant_type,
                "blocksize": blocksize,
                "double_quant": double_quant,
                "quant_storage": quant_storage,
            }
            quant_storage = settings.pop("quant_storage")
            quant = ops.quantize_4bit(source.weight.detach(), **settings)
        if compute_dtype is None:
            compute_dtype = source.compute_dtype if own else bnb.compute_dtype(linear)
        layer = cls._holding(quant, quant_storage, compute_dtype)
        layer.bias = source.bias
        return layer.train(linear.training)

    @classmethod
    def _holding(
        cls, quant: ops.Quant4bit, quant_storage: torch.dtype, compute_dtype: torch.dtype | None
    ) -> Linear4bit:
        """A layer without bias whose weight is ``quant`` itself."""
        layer = cls(
            quant.shape[1], quant.shape[0], False, "meta", quant.dtype,
            compute_dtype=compute_dtype, quant_storage=quant_storage,
        )  # fmt: skip
        layer._store(quant)
        return layer

    @property
    def quant(self) -> ops.Quant4bit:
        """The weight as the operations take it; nothing is copied."""
        weight = self.weight
        if weight.dtype != self.quant_storage:
            raise TypeError(
                f"the packed weight is {weight.dtype}, but was stored as {self.quant_storage}: "
                "something cast its bytes as numbers (FSDP's mixed precision does); construct the "
                f"layer with quant_storage={weight.dtype}"
            )
        return ops.Quant4bit(
            weight, self.absmax, self.nested_absmax, self.nested_code, self.nested_offset,
            self.quant_type, self.blocksize, self.nested_blocksize,
            (self.out_features, self.in_features), self.dtype,
        )  # fmt: skip

    @property
    def double_quant(self) -> bool:
        """Whether the absmax are quantised too."""
        return self.nested_blocksize != 0

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W ``[out_features, in_features]`` in ``dtype``; as it was quantised unless given."""
        return ops.dequantize_4bit(self.quant, dtype)

    def with_values(self, dense: Tensor) -> Linear4bit:
        """A layer of the same settings for W ``[out_features, in_features]``, without bias."""
        quant = self._quantized(dense)._replace(dtype=self.dtype)
        return self._holding(quant, self.quant_storage, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` in the dtype of x ``[..., in_features]``."""
        kind = x.dtype if self.compute_dtype is None else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(kind)
        with no_autocast(x):
            y = ops.lora_linear(x.to(kind), self.quant, bias=bias)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        shown = [
            f"in_features={self.in_features}, out_features={self.out_features}",
            f"bias={self.bias is not None}, quant_type={self.quant_type!r}",
            f"blocksize={self.blocksize}, double_quant={self.double_quant}",
        ]
        if self.compute_dtype is not None:
            shown.append(f"compute_dtype={self.compute_dtype}")
        if self.quant_storage != torch.uint8:
            shown.append(f"quant_storage={self.quant_storage}")
        return ", ".join(shown)

    def _quantized(self, dense: Tensor) -> ops.Quant4bit:
        return ops.quantize_4bit(
            dense,
            quant_type=self.quant_type,
            blocksize=self.blocksize,
            double_quant=self.double_quant,
        )

    def _store(self, quant: ops.Quant4bit) -> None:
        """Takes the parts of ``quant`` as they are, its packed bytes as ``quant_storage``."""
        packed = held_as(quant.packed, self.quant_storage)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for name in _BUFFERS:
            self.register_buffer(name, getattr(quant, name), persistent=False)
        self.quant_type, self.dtype = quant.quant_type, quant.dtype
        self.blocksize, self.nested_blocksize = quant.blocksize, quant.nested_blocksize

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear4bit:
        """Moves the weight with the module; its bytes and its f32 parts keep their types."""
        kept = {id(tensor) for tensor in (self.weight, *(getattr(self, n) for n in _BUFFERS))}

        def exact(tensor: Tensor) -> Tensor:
            if id(tensor) not in kept:
                return fn(tensor)
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(exact, recurse)  # type: ignore[no-untyped-call]
        return self

    def _fqn_modifiers(self) -> dict[str, str]:
        """Where torch.distributed.checkpoint looks up the keys below ``weight``, as attributes."""
        return {"weight": "_keys"}

    @property
    def _keys(self) -> SimpleNamespace:
        parts = SimpleNamespace()
        for name, tensor in checkpoint.to_tensors(self.quant).items():
            first, _, second = name.partition(".")
            setattr(parts, first, SimpleNamespace(**{second: tensor}) if second else tensor)
        return SimpleNamespace(weight=parts)

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in checkpoint.to_tensors(self.quant).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}weight"
        parts = {
            name.removeprefix(f"{key}."): tensor
            for name, tensor in state_dict.items()
            if name.startswith(f"{key}.")
        }
        rest = {name: x for name, x in state_dict.items() if not name.startswith(f"{key}.")}
        if key in rest:
            try:
                rest[key] = self._take(
                    rest[key], parts, bool(local_metadata.get("assign_to_params_buffers"))
                )
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{key}: {error}")
                rest[key] = self.weight
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _take(self, weight: Tensor, parts: dict[str, Tensor], assign: bool) -> Tensor:
        """Loads all but the packed codes, which are returned for `nn.Module` to load.

        Tensors of the layer's own sizes are written in place, as in every module: another layer
        that shares them sees the same weight.
        """
        shape = (self.out_features, self.in_features)
        materialised = not self.weight.is_meta
        if parts or weight.shape != shape or not weight.is_floating_point():
            loaded = checkpoint.from_tensors(weight, parts)
        else:
            loaded = self._quantized(weight.to(self.weight.device) if materialised else weight)
        if loaded.shape != shape:
            raise ValueError(f"has shape {list(loaded.shape)}, but the layer {list(shape)}")
        if not materialised and not assign:
            return weight  # `nn.Module` warns that nothing is loaded
        loaded = loaded._replace(packed=held_as(loaded.packed, self.quant_storage))
        own = self.quant
        same = all(alike(a, b) for a, b in zip(loaded.tensors, own.tensors, strict=True))
        if assign or not same:
            device = loaded.packed.device if assign else self.weight.device
            moved: Any = {
                name: part.to(device, copy=not assign)
                for name in ("packed", *_BUFFERS)
                if (part := getattr(loaded, name)) is not None
            }
            self._store(loaded._replace(**moved))
            return self.weight
        with torch.no_grad():
            for target, source in zip(own.tensors[1:], loaded.tensors[1:], strict=True):
                if target is not None and source is not None:
                    target.copy_(source)
        self.quant_type, self.dtype = loaded.quant_type, loaded.dtype
        self.blocksize, self.nested_blocksize = loaded.blocksize, loaded.nested_blocksize
        return loaded.packed
