"""The adapter's part of LoRA layers: its parameters, merging, and what state dicts hold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar

import torch
from torch import nn

from .. import ops
from .linear4bit import Linear4bit

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Self

Base = TypeVar("Base", nn.Linear, Linear4bit)


class AdapterOptions(TypedDict, total=False):
    """The keyword arguments of an adapter; see ``LoraLinear``."""

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    lora_bias: bool
    init_lora_weights: bool | Literal["gaussian"]
    adapter_name: str
    adapter_dtype: torch.dtype | None


class Lora(nn.Module, Generic[Base]):
    """A frozen base layer and its adapter; subclasses say how the base is read and merged."""

    base_layer: Base

    def __init__(
        self,
        base_layer: Base,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        init_lora_weights: bool | Literal["gaussian"] = True,
        adapter_name: str = "default",
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ValueError(f"r must be 1 or more, not {r}")
        if not 0 <= lora_dropout <= 1:
            raise ValueError(f"lora_dropout must be in [0, 1], not {lora_dropout}")
        if init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', not {init_lora_weights!r}"
            )
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.lora_alpha, self.use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout = lora_dropout
        self.init_lora_weights = init_lora_weights
        self.adapter_name = adapter_name
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(base_layer.weight.dtype, torch.float32)
        options: dict[str, Any] = {"device": base_layer.weight.device, "dtype": adapter_dtype}
        down = nn.Linear(self.in_features, r, bias=False, **options)
        up = nn.Linear(r, self.out_features, bias=lora_bias, **options)
        self.lora_A = nn.ModuleDict({adapter_name: down})
        self.lora_B = nn.ModuleDict({adapter_name: up})
        # In a tuple, which keeps it out of the module's children and its state dict.
        self._unmerged: tuple[Base] | None = None
        if init_lora_weights:
            self.reset_lora_parameters()

    @property
    def scaling(self) -> float:
        """By what the adapter's term is multiplied: lora_alpha / r, or lora_alpha / √r (rsLoRA)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def merged(self) -> bool:
        """Whether the adapter is part of ``base_layer.weight`` now."""
        return self._unmerged is not None

    def reset_lora_parameters(self) -> None:
        """PEFT's initialisation of A and B; see ``init_lora_weights``."""
        down: Any = self.lora_A[self.adapter_name]
        up: Any = self.lora_B[self.adapter_name]
        if not self.init_lora_weights:
            down.reset_parameters()
            up.reset_parameters()
            return
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(down.weight, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        if up.bias is not None:
            nn.init.zeros_(up.bias)

    @torch.no_grad()
    def get_delta_weight(self) -> Tensor:
        """``scaling·B·A`` ``[out_features, in_features]``, float32 (float64 for such adapters)."""
        down, up, _ = self._adapter()
        wide = torch.promote_types(down.dtype, torch.float32)
        return (up.to(wide) @ down.to(wide)) * self.scaling

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Makes the adapter part of the base weight, rounded once to its type.

        The original weight is kept beside it for ``unmerge``. Then ``base_layer`` is a plain layer
        that computes what this one does without dropout; ``lora_bias`` is part of its bias.

        Raises ``RuntimeError`` if the layer is merged, and with ``safe_merge`` ``ValueError`` if
        the adapter has a value that is not finite. A 4-bit weight is quantised again, which rounds
        it: only finite adapters can be merged there.
        """
        if self._unmerged is not None:
            raise RuntimeError("the adapter is merged already: unmerge() first")
        base = self.base_layer
        _, _, lora_bias = self._adapter()
        bias = None if base.bias is None else base.bias.detach().clone()
        if lora_bias is not None:
            wide = torch.promote_types(lora_bias.dtype, torch.float32)
            term = lora_bias.detach().to(wide) * self.scaling
            kind = self._value_dtype() if bias is None else bias.dtype
            bias = (term if bias is None else bias.to(wide) + term).to(kind)
        delta = self.get_delta_weight()
        if safe_merge and not (delta.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"adapter {self.adapter_name!r} has values that are not finite")
        merged = self._merged_base(delta)
        if bias is not None:
            merged.bias = nn.Parameter(bias, requires_grad=False)
        self._unmerged = (base,)
        self.base_layer = merged.train(base.training)

    def unmerge(self) -> None:
        """Puts the original base layer back, bit for bit.

        Raises ``RuntimeError`` if the layer is not merged.
        """
        if self._unmerged is None:
            raise RuntimeError("the adapter is not merged")
        (self.base_layer,), self._unmerged = self._unmerged, None

    def extra_repr(self) -> str:
        shown = f"r={self.r}, lora_alpha={self.lora_alpha}, scaling={self.scaling:.4g}"
        shown += f", lora_dropout={self.lora_dropout}"
        if self.use_rslora:
            shown += ", use_rslora=True"
        return shown + (", merged" if self.merged else "")

    def _value_dtype(self) -> torch.dtype:
        raise NotImplementedError

    def _merged_base(self, delta: Tensor) -> Base:
        raise NotImplementedError

    def _adapter(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
        """lora_A ``[r, k]``, lora_B ``[n, r]``, lora_bias ``[n]``."""
        up: Any = self.lora_B[self.adapter_name]
        down: Any = self.lora_A[self.adapter_name]
        return down.weight, up.weight, up.bias

    def _layers(self) -> tuple[Base, Any, Any]:
        """The base layer and the adapter's; every look-up of a module's attribute takes time."""
        name = self.adapter_name
        return self.base_layer, self.lora_A[name], self.lora_B[name]

    def _through_modules(self, x: Tensor, base: Base, down: Any, up: Any) -> Tensor | None:
        """y by calling the base layer and the adapter's modules, where that is more than a product.

        They may have hooks or be wrapped: FSDP shards parameters by such modules, and has them
        whole during their forward alone. None where the parameters can be used as they are.
        """
        if not (_does_more(base) or _does_more(down) or _does_more(up)):
            return None
        y: Tensor = base(x)
        dropped = x.to(down.weight.dtype)
        if self.training and self.lora_dropout:
            seed = ops.dropout_seed(x)
            dropped = dropped * ops.dropout_mask(
                x.shape, self.lora_dropout, seed, dtype=dropped.dtype
            )
        term: Tensor = up(down(dropped)) * self.scaling
        return (y + term).to(y.dtype)

    def _linear(
        self, x: Tensor, weight: Tensor | ops.Quant4bit | None, base: Base, down: Any, up: Any
    ) -> Tensor:
        """The whole layer with W, or the adapter's term alone without."""
        bias = None if weight is None else base.bias
        return ops.lora_linear(
            x,
            weight,
            down.weight,
            up.weight,
            self.scaling,
            bias=None if bias is None else bias.to(x.dtype),
            lora_bias=up.bias,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._unmerged is not None:
            self._unmerged[0]._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        if self._unmerged is not None:
            raise RuntimeError(
                f"{args[1]}base_layer is merged: unmerge() before weights are loaded"
            )
        super()._load_from_state_dict(*args)


def _does_more(module: nn.Module) -> bool:
    """Whether calling a linear layer does more than its class's forward."""
    return type(module) not in (nn.Linear, Linear4bit) or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
