"""What the operations take: 4-bit weights and projections, as plain tensors and numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from typing import Any

    from torch import Tensor

BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_NESTED_BLOCKSIZE = 256


class Quant4bit(NamedTuple):
    """A matrix ``[n, k]`` in bitsandbytes' 4-bit format; the tensors are used where they lie.

    Element i of the flattened matrix is ``codebook[code i] · absmax[i // blocksize]`` in f32,
    rounded to ``dtype``; bytes hold the even element's code in their high half.
    """

    packed: Tensor  # ceil(n·k / 2) bytes, of any storage dtype, contiguous
    absmax: Tensor  # [blocks] f32, or uint8 codes when nested
    nested_absmax: Tensor | None  # [ceil(blocks / nested_blocksize)] f32
    nested_code: Tensor | None  # [256] f32
    nested_offset: Tensor | None  # one element; never read on the host
    quant_type: str  # "nf4" or "fp4"
    blocksize: int
    nested_blocksize: int  # 0 when not nested
    shape: tuple[int, ...]  # (n, k)
    dtype: torch.dtype  # the type that was quantised

    @property
    def nested(self) -> bool:
        """Whether the absmax are quantised too."""
        return self.nested_absmax is not None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All parts in the order of the fields."""
        return self[:5]

    @classmethod
    def from_bitsandbytes(
        cls, packed: Tensor, quant_state: Any, *, check: bool = True
    ) -> Quant4bit:
        """A view of bitsandbytes' weight and ``QuantState``; nothing is copied.

        Raises ``ValueError`` if the tensors do not fit the state's shape, unless that was checked
        before (``check=False``).
        """
        nested = quant_state.state2 if quant_state.nested else None
        quant = cls(
            packed=packed.detach(),
            absmax=quant_state.absmax,
            nested_absmax=None if nested is None else nested.absmax,
            nested_code=None if nested is None else nested.code,
            nested_offset=None if nested is None else quant_state.offset,
            quant_type=quant_state.quant_type,
            blocksize=quant_state.blocksize,
            nested_blocksize=0 if nested is None else nested.blocksize,
            shape=tuple(quant_state.shape),
            dtype=quant_state.dtype,
        )
        if check:
            quant.check()
        return quant

    def check(self) -> None:
        """Raises ``ValueError`` saying which part does not fit the shape."""
        if self.quant_type not in ("nf4", "fp4"):
            raise ValueError(f"quant_type must be 'nf4' or 'fp4', not {self.quant_type!r}")
        if self.blocksize not in BLOCKSIZES:
            raise ValueError(f"blocksize must be one of {BLOCKSIZES}, not {self.blocksize}")
        elements = 1
        for size in self.shape:
            elements *= size
        blocks = -(-elements // self.blocksize)
        wanted = [
            ("packed bytes", self.packed.numel() * self.packed.element_size(), -(-elements // 2)),
            ("absmax", self.absmax.numel(), blocks),
        ]
        dtypes = [("absmax", self.absmax, torch.uint8 if self.nested else torch.float32)]
        if self.nested_absmax is not None:
            if self.nested_code is None or self.nested_offset is None:
                raise ValueError("nested_absmax, nested_code and nested_offset go together")
            if self.nested_blocksize != _NESTED_BLOCKSIZE:
                raise ValueError(f"nested blocksize must be 256, not {self.nested_blocksize}")
            wanted += [
                ("nested absmax", self.nested_absmax.numel(), -(-blocks // self.nested_blocksize)),
                ("nested quant_map", self.nested_code.numel(), 256),
                ("nested offset", self.nested_offset.numel(), 1),
            ]
            dtypes += [
                ("nested absmax", self.nested_absmax, torch.float32),
                ("nested quant_map", self.nested_code, torch.float32),
            ]
        for name, found, needed in wanted:
            # A quant_storage wider than a byte rounds the packed size up to whole elements.
            slack = self.packed.element_size() - 1 if name == "packed bytes" else 0
            if not needed <= found <= needed + slack:
                raise ValueError(
                    f"{name}: {found} of them, but shape {list(self.shape)} in blocks of "
                    f"{self.blocksize} has {needed}; the weight is truncated or of another shape"
                )
        for name, tensor, dtype in dtypes:
            if tensor.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, not {tensor.dtype}")
        for part in self.tensors:
            if part is not None and not part.is_contiguous():
                raise ValueError("the parts of a 4-bit weight must be contiguous")


class Projection(NamedTuple):
    """``y = x·Wᵀ + bias + scaling·(dropout(x)·Aᵀ·Bᵀ + lora_bias)``, of x ``[..., k]``."""

    weight: Tensor | None = None  # dense [n, k]; None with quant, or for the LoRA term alone
    quant: Quant4bit | None = None
    bias: Tensor | None = None  # [n]
    lora_A: Tensor | None = None  # [r, k]; None without adapter
    lora_B: Tensor | None = None  # [n, r]
    lora_bias: Tensor | None = None  # [n]
    scaling: float = 1.0
    dropout_p: float = 0.0
    stream: int = 0  # of the dropout mask; its index in the group

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k)"""
        weight, quant = self.weight, self.quant
        if weight is not None:
            n, k = weight.shape
            return n, k
        if quant is not None:
            return quant.shape[0], quant.shape[1]
        if self.lora_A is None or self.lora_B is None:
            raise ValueError("a projection needs a weight or an adapter")
        return self.lora_B.shape[0], self.lora_A.shape[1]

    @property
    def rank(self) -> int:
        """r; 0 without adapter."""
        return 0 if self.lora_A is None else self.lora_A.shape[0]


class Grads(NamedTuple):
    """Gradients of a group; None where none was asked for. Lists are by projection."""

    x: Tensor | None
    lora_A: list[Tensor | None]
    lora_B: list[Tensor | None]
    bias: list[Tensor | None]
    lora_bias: list[Tensor | None]


class Need(NamedTuple):
    """Which gradients of a group are asked for. Tuples are by projection."""

    x: bool
    lora_A: tuple[bool, ...]
    lora_B: tuple[bool, ...]
    bias: tuple[bool, ...]
    lora_bias: tuple[bool, ...]
    grads: torch.dtype | None = None
    """Of the adapters' gradients, if it is wider than theirs: a backend may give them in it."""
