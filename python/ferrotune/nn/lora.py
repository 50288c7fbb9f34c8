"""Linear layers with a LoRA adapter on a frozen weight, dense or in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from .adapter import Lora
from .linear4bit import Linear4bit
from .parts import kind_of

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self, Unpack

    from .adapter import AdapterOptions


class LoraLinear(Lora[nn.Linear]):
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
        Lora.__init__(layer, linear, **adapter)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` in the dtype of x ``[..., in_features]``, which is W's."""
        if self.merged:
            return self.base_layer(x)  # type: ignore[no-any-return]
        layers = base, _, _ = self._layers()
        y = self._through_modules(x, *layers)
        return self._linear(x, base.weight, *layers) if y is None else y

    def _value_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _merged_base(self, delta: Tensor) -> nn.Linear:
        weight = self.base_layer.weight
        total = torch.promote_types(weight.dtype, delta.dtype)
        merged = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        merged.weight = nn.Parameter((weight.to(total) + delta).to(weight.dtype), False)
        return merged


class LoraLinear4bit(Lora[Linear4bit]):
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
        Lora.__init__(layer, base_layer, **adapter)
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """y ``[..., out_features]`` in the dtype of x ``[..., in_features]``."""
        if self.merged:
            return self.base_layer(x)  # type: ignore[no-any-return]
        layers = base, _, _ = self._layers()
        found = self._through_modules(x, *layers)
        if found is not None:
            return found
        dtype = x.dtype if base.compute_dtype is None else base.compute_dtype
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            together = dtype == torch.get_autocast_dtype(kind)
        else:
            together = torch.promote_types(x.dtype, dtype) == dtype
        if together:
            if x.dtype == dtype:
                return self._linear(x, base.quant, *layers)
            return self._linear(x.to(dtype), base.quant, *layers).to(x.dtype)
        y: Tensor = base(x)
        return y + self._linear(x, None, *layers).to(x.dtype)

    def _value_dtype(self) -> torch.dtype:
        return self.base_layer.dtype

    def _merged_base(self, delta: Tensor) -> Linear4bit:
        base = self.base_layer
        return base.with_values(base.dequantize().to(delta.dtype) + delta)
