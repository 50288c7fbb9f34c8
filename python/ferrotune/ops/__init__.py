"""LoRA and 4-bit operations for PyTorch, with PEFT's and bitsandbytes' semantics.

Each is also an operator of PyTorch's dispatcher (``torch.ops.ferrotune``) with a fake kernel and
autograd, which ``torch.compile`` takes without a graph break.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import autograd, flat, library, mlp
from . import dropout as _dropout
from .blocks import ACTIVATIONS, glu, rms_norm, rope
from .cross_entropy import linear_cross_entropy
from .types import BLOCKSIZES, Projection, Quant4bit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

__all__ = [
    "Projection",
    "Quant4bit",
    "dequantize_4bit",
    "dropout_mask",
    "dropout_seed",
    "gated_mlp",
    "glu",
    "linear_cross_entropy",
    "lora_linear",
    "lora_linear_group",
    "quantize_4bit",
    "rms_norm",
    "rope",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def lora_linear(
    x: Tensor,
    weight: Tensor | Quant4bit | None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    *,
    bias: Tensor | None = None,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``y = x·Wᵀ + bias + scaling·(dropout(x)·Aᵀ·Bᵀ + lora_bias)`` (Hu et al., 2021).

    Args:
        x: ``[..., k]``, float32, float16 or bfloat16 (float64 too, in plain PyTorch).
        weight: frozen W ``[n, k]`` in x's dtype, or a 4-bit one; None for the LoRA term alone. A
            dense W that requires a gradient gets one, through PyTorch's own linear.
        lora_A: ``[r, k]``; None without adapter. Of any float dtype, as ``lora_B`` ``[n, r]``.
        scaling: ``lora_alpha / r``, or ``lora_alpha / √r`` (rsLoRA).
        bias: ``[n]``, of x's dtype.
        lora_bias: ``[n]``: the bias of PEFT's ``lora_B`` layer.
        dropout_p: probability with which an element of x is dropped before A; realised to 2⁻¹⁷.
        seed: of the dropout mask, from ``dropout_seed``; drawn from PyTorch's generator if None.

    Returns:
        ``[..., n]`` in x's dtype. Under autocast, x and all weights are cast to its dtype first.

    The LoRA term is computed in the wider of x's and A's dtypes. Gradients have the dtype of what
    they belong to; a second derivative raises ``RuntimeError``. Raises ``ValueError`` or
    ``TypeError`` naming the argument that does not fit.
    """
    dense, quant = (None, weight) if isinstance(weight, Quant4bit) else (weight, None)
    projection = Projection(dense, quant, bias, lora_A, lora_B, lora_bias, scaling, dropout_p)
    return _run(x, [projection], seed)[0]


def lora_linear_group(
    x: Tensor, projections: Sequence[Projection], *, seed: Tensor | None = None
) -> list[Tensor]:
    """``lora_linear`` of projections that share x (q, k and v; gate and up), as one operation.

    Each has a dropout mask of its own: ``Projection.stream`` of one seed, its index in the group
    unless the projections' streams differ already.

    Returns ``y`` ``[..., n]`` of every projection. Errors are those of ``lora_linear``.
    """
    if len(projections) > 1 and len({projection.stream for projection in projections}) == 1:
        projections = [projection._replace(stream=i) for i, projection in enumerate(projections)]
    return _run(x, list(projections), seed)


def gated_mlp(
    x: Tensor,
    gate: Projection,
    up: Projection,
    down: Projection,
    activation: str = "silu",
    *,
    seed: Tensor | Sequence[Tensor | None] | None = None,
) -> Tensor:
    """``down(activation(gate(x))·up(x))``, one node of autograd: the MLP of Llama and its kind.

    What it keeps for backward is x, gate(x) and up(x); the product of the activation is made again.
    With dropout the masks are streams 0, 1 and 2 of one seed; given three seeds, those of three
    ``lora_linear`` by them (None where nothing is dropped). ``activation`` is one of `glu`'s, and
    everything else as in ``lora_linear``.

    Returns ``[..., n]`` of ``down``.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    alone = seed is not None and not isinstance(seed, torch.Tensor)
    seeds: mlp.Seeds = tuple(seed) if alone else (seed,)  # type: ignore[arg-type, assignment]
    if alone and len(seeds) != 3:
        raise ValueError(f"gate, up and down take one seed or three, not {len(seeds)}")
    for name, one, own in zip(("gate", "up", "down"), (gate, up, down), seeds, strict=False):
        if alone and own is None and one.dropout_p > 0:
            raise ValueError(f"{name} drops (dropout_p={one.dropout_p}) and needs a seed, not None")
    streamed = [one._replace(stream=0 if alone else i) for i, one in enumerate((gate, up, down))]
    x, projections = _autocast(x, streamed)
    for projection in projections[:2]:
        _check(x, projection)
    inner, hidden = projections[2].shape[1], [one.shape[0] for one in projections[:2]]
    if hidden != [inner, inner]:
        raise ValueError(f"gate and up have {hidden} out features, but down takes {inner}")
    _check(x.new_empty(0, inner), projections[2])
    if seed is None and any(projection.dropout_p > 0 for projection in projections):
        seeds = (dropout_seed(x),)
    trained = any(_is_trained(projection.weight) for projection in projections)
    if not trained and not torch.compiler.is_compiling():
        return mlp.apply(x, projections, activation, seeds, streamed)
    if alone:
        first, second = (_run(x, [projections[i]], seeds[i])[0] for i in range(2))
    else:
        first, second = _run(x, projections[:2], seeds[0])
    return _run(glu(first, second, activation), projections[2:], seeds[-1])[0]


def _autocast(x: Tensor, projections: list[Projection]) -> tuple[Tensor, list[Projection]]:
    """x and the projections as autocast has them; in eager mode what is cast of these is no part
    of a graph, and the operation gives the originals their gradients."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, projections
    dtype = torch.get_autocast_dtype(x.device.type)
    x = x.to(dtype)
    if torch.compiler.is_compiling() or any(_is_trained(one.weight) for one in projections):
        return x, [_cast(projection, dtype) for projection in projections]
    with torch.no_grad():
        return x, _cast_together(projections, dtype)


def _cast_together(projections: list[Projection], dtype: torch.dtype) -> list[Projection]:
    """All tensors of another float type in one go."""
    made: dict[int, Tensor] = {}
    sources: list[Tensor] = []
    for weight, _, bias, lora_A, lora_B, lora_bias, _, _, _ in projections:
        for tensor in (lora_A, lora_B, weight, bias, lora_bias):
            if (
                tensor is not None
                and tensor.dtype != dtype
                and id(tensor) not in made
                and tensor.is_floating_point()
            ):
                made[id(tensor)] = torch.empty_like(tensor, dtype=dtype)
                sources.append(tensor)
    if not sources:
        return projections
    torch._foreach_copy_(list(made.values()), sources)

    def cast(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None else made.get(id(tensor), tensor)

    return [_each(projection, cast) for projection in projections]


def _run(x: Tensor, projections: list[Projection], seed: Tensor | None) -> list[Tensor]:
    given = projections
    x, projections = _autocast(x, projections)
    trained = dropped = False
    for projection in projections:
        _check(x, projection)
        trained = trained or _is_trained(projection.weight)
        dropped = dropped or projection.dropout_p > 0
    if trained:
        return _with_trained_weights(x, projections, seed)
    if seed is None and dropped:
        seed = dropout_seed(x)
    if not torch.compiler.is_compiling():
        return list(autograd.apply(x, projections, seed, given))
    numbers = flat.numbers(projections)
    if len(projections) == 1:
        return [
            torch.ops.ferrotune.lora_linear(
                x, seed, *flat.tensors(projections[0]), *(column[0] for column in numbers)
            )[0]
        ]
    columns = flat.by_name(x, projections)
    return list(torch.ops.ferrotune.lora_linear_group(x, seed, *columns, *numbers)[0])


def _is_trained(weight: Tensor | None) -> bool:
    return weight is not None and weight.requires_grad and torch.is_grad_enabled()


def _with_trained_weights(
    x: Tensor, projections: list[Projection], seed: Tensor | None
) -> list[Tensor]:
    """Trained W go through PyTorch's linear; the rest of their projections is added."""
    found: list[Tensor] = []
    trained = [
        projection.weight if _is_trained(projection.weight) else None for projection in projections
    ]
    rest = [
        projection if weight is None else projection._replace(weight=None, bias=None)
        for projection, weight in zip(projections, trained, strict=True)
    ]
    live = [
        projection
        for projection in rest
        if projection.weight is not None or projection.quant is not None or projection.rank
    ]
    terms = iter(_run(x, live, seed) if live else [])
    for projection, weight, other in zip(projections, trained, rest, strict=True):
        term = next(terms) if any(other is one for one in live) else None
        if weight is not None:
            base = torch.nn.functional.linear(x, weight, projection.bias)
            term = base if term is None else base + term
        assert term is not None
        found.append(term)
    return found


def _cast(projection: Projection, dtype: torch.dtype) -> Projection:
    def cast(tensor: Tensor | None) -> Tensor | None:
        return tensor.to(dtype) if tensor is not None and tensor.is_floating_point() else tensor

    return _each(projection, cast)


def _each(projection: Projection, cast: Callable[[Tensor | None], Tensor | None]) -> Projection:
    """The projection with ``cast`` of its dense weight and of all that may be trained."""
    weight, quant, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, stream = projection
    return Projection(
        cast(weight),
        quant,
        cast(bias),
        cast(lora_A),
        cast(lora_B),
        cast(lora_bias),
        scaling,
        dropout_p,
        stream,
    )


def _check(x: Tensor, projection: Projection) -> None:
    if x.dtype not in _FLOATS:
        raise TypeError(f"x must be float32, float16 or bfloat16, not {x.dtype}")
    weight, _, bias, lora_A, lora_B, lora_bias, _, dropout_p, _ = projection
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be in [0, 1], not {dropout_p}")
    n, k = projection.shape
    if x.shape[-1:] != (k,):
        raise ValueError(f"x has shape {list(x.shape)}, but the weight is [{n}, {k}]: k differs")
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(f"weight is {weight.dtype}, but x is {x.dtype}: cast one of them")
    if bias is not None and (bias.shape != (n,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be [{n}] in {x.dtype}, not {list(bias.shape)} {bias.dtype}")
    if (lora_A is None) != (lora_B is None):
        raise ValueError("lora_A and lora_B go together")
    if lora_A is None or lora_B is None:
        return
    r = lora_A.shape[0]
    if lora_A.shape != (r, k) or lora_B.shape != (n, r):
        raise ValueError(
            f"lora_A must be [r, {k}] and lora_B [{n}, r], not {list(lora_A.shape)} and "
            f"{list(lora_B.shape)}"
        )
    if lora_bias is not None and lora_bias.shape != (n,):
        raise ValueError(f"lora_bias must be [{n}], not {list(lora_bias.shape)}")


def quantize_4bit(
    values: Tensor, *, blocksize: int = 64, quant_type: str = "nf4", double_quant: bool = True
) -> Quant4bit:
    """``values`` in bitsandbytes' 4-bit format; codes and absmax are those of its code.

    Args:
        values: float32, float16 or bfloat16, of any shape; finite.
        blocksize: elements that share an absmax: 32 to 4096, a power of two.
        quant_type: "nf4" or "fp4" (Dettmers et al., 2023).
        double_quant: quantises the absmax too, to 8 bits in blocks of 256.

    Nothing of the result has a gradient. Raises ``TypeError`` for another dtype and ``ValueError``
    for another block size or type.
    """
    if values.dtype not in _FLOATS[:3]:
        raise TypeError(f"values must be float32, float16 or bfloat16, not {values.dtype}")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, not {blocksize}")
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"quant_type must be 'nf4' or 'fp4', not {quant_type!r}")
    packed, absmax, *nested = torch.ops.ferrotune.quantize_4bit(
        values.detach(), blocksize, quant_type, double_quant
    )
    nested_absmax, nested_code, nested_offset = nested if double_quant else (None, None, None)
    return Quant4bit(
        packed, absmax, nested_absmax, nested_code, nested_offset,
        quant_type, blocksize, 256 if double_quant else 0, tuple(values.shape), values.dtype,
    )  # fmt: skip


def dequantize_4bit(quant: Quant4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The values of ``quant`` in ``dtype`` (the quantised one unless given); bitsandbytes' bits.

    They have no gradient, as 4-bit weights are frozen: ``lora_linear`` has one through them, to x.
    Raises ``ValueError`` if the parts do not fit together.
    """
    if not torch.compiler.is_compiling():
        quant.check()
    return torch.ops.ferrotune.dequantize_4bit(  # type: ignore[no-any-return]
        *quant.tensors, quant.quant_type, quant.blocksize, quant.nested_blocksize,
        list(quant.shape), quant.dtype, quant.dtype if dtype is None else dtype,
    )  # fmt: skip


def dropout_seed(x: Tensor) -> Tensor:
    """One draw of PyTorch's generator of x's device, for one operation's masks: int64 ``[1]``.

    ``torch.manual_seed``, checkpointing and CUDA graphs hold for it as for ``nn.Dropout``.
    """
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=x.device)


def dropout_mask(
    shape: Sequence[int],
    p: float,
    seed: Tensor,
    stream: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What ``lora_linear`` multiplies x of this shape by: 0 or 1/(1 − p); on the seed's device."""
    elements = 1
    for size in shape:
        elements *= size
    return _dropout.mask(elements, p, seed, stream).to(dtype).reshape(tuple(shape))


_ = library  # registers the operators
