"""Linear layers with a LoRA adapter on a frozen weight, dense or in 4 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Literal, TypedDict, TypeVar

import torch
from torch import nn

from .. import ops
from .linear4bit import Linear4bit, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Self, Unpack

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


class _Lora(nn.Module, Generic[Base]):
    """The adapter's part of both layers: its parameters, merging, and what state dicts hold."""

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

    def _through_modules(self, x: Tensor) -> Tensor | None:
        """y by calling the base layer and the adapter's modules, where that is more than a product.

        They may have hooks or be wrapped: FSDP shards parameters by such modules, and has them
        whole during their forward alone. None where the parameters can be used as they are.
        """
        down: Any = self.lora_A[self.adapter_name]
        up: Any = self.lora_B[self.adapter_name]
        if not any(map(_does_more, (self.base_layer, down, up))):
            return None
        y: Tensor = self.base_layer(x)
        dropped = x.to(down.weight.dtype)
        if self.training and self.lora_dropout:
            seed = ops.dropout_seed(x)
            dropped = dropped * ops.dropout_mask(
                x.shape, self.lora_dropout, seed, dtype=dropped.dtype
            )
        return (y + up(down(dropped)) * self.scaling).to(y.dtype)

    def _linear(self, x: Tensor, weight: Tensor | ops.Quant4bit | None) -> Tensor:
        """The whole layer with W, or the adapter's term alone without."""
        down, up, lora_bias = self._adapter()
        bias = None if weight is None or self.base_layer.bias is None else self.base_layer.bias
        return ops.lora_linear(
            x,
            weight,
            down,
            up,
            self.scaling,
            bias=None if bias is None else bias.to(x.dtype),
            lora_bias=lora_bias,
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


class LoraLinear(_Lora[nn.Linear]):
    """``y = x·Wᵀ + bias + scaling·(dropout(x)·Aᵀ·Bᵀ + lora_bias)``, W and bias frozen.

    LoRA (Hu et al., 2021) with PEFT's semantics and its layer's state dict: ``base_layer.weight``,
    ``base_layer.bias``, ``lora_A.default.weight``, ``lora_B.default.weight``,
    ``lora_B.default.bias``. The modules inside hold the parameters and are called
    only if they have hooks, or are wrapped (by FSDP) or replaced.

    Args:
        in_features: k.
        out_features: n.
        bias: whether the frozen layer has a bias ``[n]``.
        device: where the layer is.
        dtype: type of W and bias.
        r: the adapter's rank.
        lora_alpha: scaling is lora_alpha / r.
        lora_dropout: probability with which an element of x is dropped before A, in training.
        use_rslora: scaling is lora_alpha / √r (Kalajdzievski, 2023).
        lora_bias: whether B has a bias ``[n]``.
        init_lora_weights: True: A uniform, B zero; "gaussian": A normal, B zero; False: B not zero.
        adapter_name: of the adapter, in the state dict's names.
        adapter_dtype: type of A and B; that of W unless given, but float32 for a 16-bit W.

    Shapes: x ``[..., k]``, y ``[..., n]`` in x's dtype, lora_A ``[r, k]``, lora_B ``[n, r]``.

    Raises ``ValueError`` for a rank, dropout or initialisation that is none.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        **adapter: Unpack[AdapterOptions],
    ) -> None:
        base_layer = nn.Linear(in_features, out_features, bias, device, dtype)
        super().__init__(base_layer, **adapter)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **adapter: Unpack[AdapterOptions]) -> Self:
        """A layer around ``linear`` itself, which becomes ``base_layer`` and is frozen.

        ``adapter`` is the constructor's keyword arguments. Raises ``TypeError`` for another layer.
        """
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            raise TypeError(
                f"from_linear takes an nn.Linear with a dense weight, not {kind_of(linear)}"
            )
        layer = cls.__new__(cls)
        _Lora.__init__(layer, linear, **adapter)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` in the dtype of x ``[..., in_features]``, which is W's."""
        if self.merged:
            return self.base_layer(x)  # type: ignore[no-any-return]
        y = self._through_modules(x)
        return self._linear(x, self.base_layer.weight) if y is None else y

    def _value_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _merged_base(self, delta: Tensor) -> nn.Linear:
        weight = self.base_layer.weight
        total = torch.promote_types(weight.dtype, delta.dtype)
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter((weight.to(total) + delta).to(weight.dtype), False)
        return merged


class LoraLinear4bit(_Lora[Linear4bit]):
    """``LoraLinear`` on a ``Linear4bit`` (QLoRA; Dettmers et al., 2023).

    State dicts have the names of PEFT's layer on bitsandbytes' Linear4bit: ``base_layer.weight``,
    ``base_layer.weight.absmax``, … , ``lora_A.default.weight``. The base layer computes in its
    ``compute_dtype``; the adapter's term is not rounded to it.

    Args:
        in_features: k.
        out_features: n.
        bias: whether the frozen layer has a bias ``[n]``.
        device: where the layer is.
        dtype: type of the values that are quantised, and of the bias.
        quant_type, blocksize, double_quant, compute_dtype, quant_storage: see ``Linear4bit``.
        adapter: the adapter's keyword arguments, those of ``LoraLinear``; A and B are float32
            unless ``adapter_dtype`` is given.

    Shapes and errors are those of ``LoraLinear`` and ``Linear4bit``.
    """

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
        **adapter: Unpack[AdapterOptions],
    ) -> None:
        base_layer = Linear4bit(
            in_features,
            out_features,
            bias,
            device,
            dtype,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            quant_storage=quant_storage,
        )
        super().__init__(base_layer, **adapter)

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
        **adapter: Unpack[AdapterOptions],
    ) -> Self:
        """A layer around ``Linear4bit.from_linear(linear, ...)``: a 4-bit weight is not copied.

        ``adapter`` is the constructor's keyword arguments. The bias of ``linear`` is used, and
        frozen. Errors are those of ``Linear4bit.from_linear``.
        """
        base_layer = Linear4bit.from_linear(
            linear,
            quant_type=quant_type,
            blocksize=blocksize,
            double_quant=double_quant,
            compute_dtype=compute_dtype,
            quant_storage=quant_storage,
        )
        layer = cls.__new__(cls)
        _Lora.__init__(layer, base_layer, **adapter)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` in the dtype of x ``[..., in_features]``."""
        base = self.base_layer
        if self.merged:
            return base(x)  # type: ignore[no-any-return]
        found = self._through_modules(x)
        if found is not None:
            return found
        dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            together = dtype == torch.get_autocast_dtype(kind)
        else:
            together = torch.promote_types(x.dtype, dtype) == dtype
        if together:
            return self._linear(x.to(dtype), base.quant).to(x.dtype)
        y: Tensor = base(x)
        return y + self._linear(x, None).to(x.dtype)

    def _value_dtype(self) -> torch.dtype:
        return self.base_layer.dtype

    def _merged_base(self, delta: Tensor) -> Linear4bit:
        base = self.base_layer
        return base.with_values(base.dequantize().to(delta.dtype) + delta)
