"""The memory of a training step by part, and its peak.

Bytes that PyTorch allocates on the device (``max_memory_allocated``): a model of transformers that
`ferrotune.patch` has patched, attention by ``scaled_dot_product_attention`` without a mask, AdamW
of torch or bitsandbytes. What a block keeps for the backward pass, an element a token:

- its norms' inputs (with the residual added); what attention and the MLP take in; a query, a key
  and a value; what attention puts out; gate and up. The MLP's hidden state is computed again in
  backward where the MLP is one node (`ferrotune.ops.gated_mlp`: with adapters, gate and up apart),
  else kept;
- in 4 bytes: a row's 1 / rms for each norm and, for each head, attention's log-sum-exp;
- with LoRA dropout a bit for its mask at each linear, as on Hopper.

What a block recomputes instead (see `LEVELS`) it has for the time of its own backward. Blocks have
their backward from the last to the first, and each lets go of what it kept after its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

from ..chunks import chunk_rows
from .shapes import Linear, Shape

Level = Literal["keep", "elementwise", "mlp", "spill", "layer", "offload"]
"""What a block keeps: all; all but what norms and activations give; neither what the MLP does; the
same, waiting in the host's memory; its input alone; nothing, its input waiting there."""
LEVELS: tuple[Level, ...] = get_args(Level)
"""In the order of what recomputing costs."""
CHECKPOINTS: tuple[Level, ...] = ("layer", "offload")
"""Those of a model that is asked for checkpointing."""
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
LEAST_MOVED = 1 << 20  # bytes that are worth a copy to the host
_WIDE = 4  # bytes of f32
_ABSMAX_GROUP = 256  # absmax values that share a scale, quantised themselves
# Of an 8-bit state: a code a value, and the f32 absmax of every 256.
_EIGHT_BITS = 1 + 4 / 256


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is trained; `dtype` is that of the model's own weights and of its activations."""

    method: Literal["full", "lora", "qlora"] = "qlora"
    r: int = 16
    lora_dropout: float = 0.0
    batch_size: int = 1
    sequence_length: int = 2048
    checkpointing: bool = False
    fused_loss: bool = True
    optimizer: Literal["adamw", "adamw_8bit", "sgd"] = "adamw"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    double_quant: bool = True
    blocksize: int = 64

    @property
    def tokens(self) -> int:
        return self.batch_size * self.sequence_length

    @property
    def element(self) -> int:
        """Bytes."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by part. They are not all there at once: see `peak`."""

    weights: int
    adapters: int
    optimizer: int
    gradients: int
    activations: int
    scratch: int
    loss: int
    head_gradient: int
    update: int
    recomputed: int = 0
    """More than ``activations`` in a block's backward, of the block for which that is the most."""
    host: int = 0
    """In pinned memory of the host, not on the device."""

    @property
    def moments(self) -> dict[str, int]:
        """Bytes at the three moments that can be the peak."""
        lasting = self.weights + self.adapters + self.optimizer
        backward = self.activations + self.recomputed + self.scratch + self.head_gradient
        return {
            "the loss": lasting + self.activations + self.loss,
            "a block's backward": lasting + backward,
            "the optimiser's step": lasting + self.gradients + self.update,
        }

    @property
    def peak(self) -> int:
        return max(self.moments.values())

    @property
    def peak_at(self) -> str:
        moments = self.moments
        return max(moments, key=lambda moment: moments[moment])


def memory(shape: Shape, setup: Setup, levels: Sequence[Level] | None = None) -> Memory:
    """What a step takes once the optimiser has its states.

    ``levels`` are the blocks', from the first; without them all keep everything, or with
    checkpointing their input.
    """
    if levels is None:
        levels = ["layer" if setup.checkpointing else "keep"] * shape.layers
    element, full = setup.element, setup.method == "full"
    trained = shape.adapter_parameters(setup.r)
    adapters = 0 if full else trained * _WIDE  # PEFT keeps them in f32
    width = _WIDE
    if full:
        trained, width = shape.linear_parameters + shape.other_parameters, element
    entry = setup.tokens * shape.hidden * element
    of = {level: level_bytes(shape, setup, level) for level in set(levels)}
    kept = [of[level][0] for level in levels]
    # What the block before needs first of the host's memory is on its way.
    ahead = [0, *(entry if one in ("spill", "offload") else 0 for one in levels)]
    backwards = zip(accumulate(kept), ahead, levels, strict=False)
    most = max(sum_ + before + of[level][1] for sum_, before, level in backwards)
    # The optimiser's foreach form makes the denominators of all parameters at once.
    update = trained * width if setup.optimizer == "adamw" else 0
    return Memory(
        weights=weight_bytes(shape, setup),
        adapters=adapters,
        optimizer=_states(trained, width, setup),
        gradients=trained * width,
        activations=2 * entry + sum(kept),  # above the blocks: the last norm's input and output
        scratch=_scratch(shape, setup),
        loss=loss_bytes(shape, setup),
        head_gradient=shape.vocabulary * shape.hidden * element if full else 0,
        update=update,
        recomputed=max(0, most - sum(kept)),
        host=sum(host_bytes(shape, setup, level) for level in levels),
    )


def weight_bytes(shape: Shape, setup: Setup) -> int:
    """The frozen or trained weights themselves; 4-bit ones with their absmax values."""
    others = shape.other_parameters * setup.element
    if setup.method != "qlora":
        return shape.linear_parameters * setup.element + others
    packed = 0
    for one in shape.linears:
        blocks = -(-one.n * one.k // setup.blocksize)
        scales = blocks * _WIDE
        if setup.double_quant:
            scales = blocks + -(-blocks // _ABSMAX_GROUP) * _WIDE
        packed += -(-one.n * one.k // 2) + scales
    return shape.layers * packed + others


def level_bytes(shape: Shape, setup: Setup, level: Level) -> tuple[int, int]:
    """What a block at a level keeps for its backward pass, and what it has more in that."""
    block, token = block_bytes(shape, setup), setup.tokens * setup.element
    entry = token * shape.hidden
    if level == "keep":
        return block, 0
    if level == "layer":
        return entry, block
    if level == "offload":  # its input is back
        return 0, block + entry
    hidden = token * shape.intermediate if keeps_hidden(shape, setup) else 0
    kept = block - 2 * entry - hidden
    if level == "elementwise":  # one at a time
        return kept, max(entry, hidden)
    mlp = shape.linears[-_mlp_linears(shape) :]
    ranks = 0 if setup.method == "full" else setup.r * len(mlp) * setup.tokens * _WIDE
    again = 2 * token * shape.intermediate + ranks + sum(mask_bytes(setup, mlp))
    if level == "spill":
        moved = spilled_bytes(shape, setup)
        return kept - again - moved, again + entry + hidden + moved
    return kept - again, again + entry + hidden


def spilled_bytes(shape: Shape, setup: Setup) -> int:
    """What a block moves to the host at level "spill": its norms' inputs, attention's query, key,
    value and output, the f32 of a row and a head of that, and its linears' masks."""
    elements = shape.norms * shape.hidden + 2 * shape.queries + 2 * shape.keys
    if shape.head_norms:
        elements += shape.queries + shape.keys
    masks = mask_bytes(setup, shape.linears[: -_mlp_linears(shape)])
    moved = sum(size for size in masks if size >= LEAST_MOVED)
    return setup.tokens * (elements * setup.element + shape.heads * _WIDE) + moved


def host_bytes(shape: Shape, setup: Setup, level: Level) -> int:
    """What a block at a level has in the host's memory."""
    if level == "spill":
        return spilled_bytes(shape, setup)
    return setup.tokens * setup.element * shape.hidden if level == "offload" else 0


def keeps_hidden(shape: Shape, setup: Setup) -> bool:
    """Whether the product of the MLP's activation is kept: where the MLP is not one node."""
    return setup.method == "full" or shape.fused or not shape.gated


def mask_bytes(setup: Setup, linears: Sequence[Linear]) -> list[int]:
    """The masks of LoRA dropout: the CUDA kernels take activations of 16 bits."""
    if setup.method == "full" or setup.lora_dropout == 0 or setup.element != 2:
        return []
    return [setup.tokens * 16 * -(-one.k // 128) for one in linears]


def _mlp_linears(shape: Shape) -> int:
    return 2 if shape.fused else 3


def block_bytes(shape: Shape, setup: Setup) -> int:
    """What one block keeps for its backward pass."""
    elements = (shape.norms + 2) * shape.hidden
    inner = (2 if shape.gated else 1) * shape.intermediate
    elements += 2 * shape.queries + 2 * shape.keys + inner
    wide = shape.norms + shape.heads
    if shape.head_norms:
        elements += shape.queries + shape.keys
        wide += shape.heads + shape.key_value_heads
    if keeps_hidden(shape, setup):
        elements += shape.intermediate
    if setup.method != "full":
        wide += setup.r * len(shape.linears)
    kept = setup.tokens * (elements * setup.element + wide * _WIDE)
    return kept + sum(mask_bytes(setup, shape.linears))


def loss_bytes(shape: Shape, setup: Setup) -> int:
    """The logits: one chunk of them, or transformers' own loss.

    That one holds them in the model's dtype and, for its f32 form, the values, their log-softmax
    and two gradients.
    """
    if setup.fused_loss:
        row = shape.vocabulary * setup.element
        chunk = min(setup.tokens, chunk_rows(setup.tokens, shape.hidden, row)) * row
        trained = shape.vocabulary * shape.hidden * _WIDE if setup.method == "full" else 0
        return chunk + setup.tokens * shape.hidden * setup.element + trained
    return setup.tokens * shape.vocabulary * (setup.element + 3 * _WIDE)


def _states(trained: int, width: int, setup: Setup) -> int:
    if setup.optimizer == "sgd":
        return 0
    return int(2 * trained * (_EIGHT_BITS if setup.optimizer == "adamw_8bit" else width))


def _scratch(shape: Shape, setup: Setup) -> int:
    """Of the MLP's backward: two gradients and the hidden state, and a dequantised weight."""
    largest = max(one.n * one.k for one in shape.linears) if setup.method == "qlora" else 0
    return (3 * setup.tokens * shape.intermediate + largest) * setup.element
