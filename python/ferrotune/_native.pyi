"""The Rust extension's functions. stubtest holds this file to the code."""

from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, final

import numpy as np
import numpy.typing as npt

from ferrotune.quant import Quantized4bit

__all__ = [
    "CudaError",
    "FormatError",
    "_ChatTemplate",
    "_ChatTokenizer",
    "__version__",
    "audit",
    "compute",
    "cpu_lora_at",
    "cpu_product_at",
    "cpu_product_units",
    "cuda_cross_entropy",
    "cuda_cross_entropy_prepare",
    "cuda_dequantize_4bit",
    "cuda_devices",
    "cuda_driver",
    "cuda_dropout_mask",
    "cuda_glu",
    "cuda_glu_backward",
    "cuda_images",
    "cuda_lora_backward",
    "cuda_lora_carries",
    "cuda_lora_forward",
    "cuda_lora_forward_gated",
    "cuda_lora_kept_bytes",
    "cuda_lora_max_columns",
    "cuda_lora_products",
    "cuda_lora_workspace",
    "cuda_prepare",
    "cuda_product",
    "cuda_quantize_4bit",
    "cuda_quantize_absmax",
    "cuda_rms_norm",
    "cuda_rms_norm_backward",
    "cuda_rms_norm_partial_rows",
    "cuda_rope",
    "cuda_scale_gradient",
    "cuda_small_division",
    "cuda_small_linear",
    "dequantize_4bit",
    "dequantize_4bit_at",
    "dropout_at",
    "dynamic_map",
    "epoch_order",
    "evaluate",
    "generate",
    "has_cuda",
    "match_targets",
    "merge",
    "prepare_rows",
    "quant_state_from_tensors",
    "quant_state_to_tensors",
    "quantize_4bit",
    "read_adapter",
    "records",
    "split",
    "train",
    "use_openmp",
    "write_adapter",
]

__version__: str
has_cuda: bool  # without it there are no functions named cuda_*

class FormatError(ValueError): ...

class CudaError(RuntimeError):
    code: int

# ---- jobs
# `config` is a JSON object with every setting of the Python function of the same name.
#
# `on_event` receives one JSON object a call, told apart by its key "event": data, model, step,
# eval, checkpoint, warning or stop. It returns True to go on and False to stop after this step,
# which writes a checkpoint as Ctrl-C does. An exception it raises ends the job and is raised here.
# KeyboardInterrupt is raised after the checkpoint is written.

# `frames` are tables with `__arrow_c_stream__`, by the names that stand for them in the settings.
# `why` says why the engine was chosen; `learners` makes that of engine torch, by its `build`.
def train(
    config: str,
    on_event: Callable[[str], bool],
    frames: dict[str, Any] | None = None,
    *,
    why: str | None = None,
    learners: Any = None,
) -> str: ...
def evaluate(
    config: str, on_event: Callable[[str], bool], frames: dict[str, Any] | None = None
) -> str: ...
def audit(config: str, frames: dict[str, Any] | None = None) -> str: ...
def records(config: str, frames: dict[str, Any] | None = None) -> str: ...
def split(config: str, frames: dict[str, Any] | None = None) -> str: ...
def generate(config: str, on_text: Callable[[str], bool] | None) -> str: ...
def merge(config: str) -> str: ...

# ---- rows for PyTorch
# Arrays of one side: ids uint32, labels int32 (-100: not trained), positions uint32 (0 begins a
# document), of all rows one behind another; offsets uint64, row i being offsets[i]:offsets[i + 1].
# The second side is None where nothing is held out; the report is a JSON object.
def prepare_rows(
    config: str, frames: dict[str, Any] | None = None
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, npt.NDArray[Any]] | None, str]: ...
def epoch_order(
    lengths: npt.NDArray[np.uint32], batch_size: int, seed: int, epoch: int, by_length: bool
) -> npt.NDArray[np.uint32]: ...

# ---- chat templates
# Messages, tools, special tokens and further variables of the template are JSON.

@final
class _ChatTemplate:
    def __new__(
        cls, source: str, special_tokens: str, tool_use: str | None = None
    ) -> _ChatTemplate: ...
    def render(
        self,
        messages: str,
        tools: str | None = None,
        add_generation_prompt: bool = False,
        variables: str | None = None,
    ) -> str: ...
    # The text, and the assistant's parts of it as pairs of character indices.
    def spans(
        self, messages: str, tools: str | None = None, variables: str | None = None
    ) -> tuple[str, list[tuple[int, int]]]: ...

@final
class _ChatTokenizer:
    def __new__(cls, folder: str | PathLike[str]) -> _ChatTokenizer: ...
    # Token ids, and the trained ones as pairs of indices.
    def encode(
        self, messages: str, tools: str | None = None, variables: str | None = None
    ) -> tuple[list[int], list[tuple[int, int]]]: ...

# One batch `[rows, columns]`: flat logits, the loss summed over the targets in nats, and that sum's
# gradients by the trained tensor's name, flat. Targets are shifted already, -100 is ignored.
# `seed` turns the adapter's dropout on for loss and gradients.
def compute(
    model: str | PathLike[str],
    ids: npt.NDArray[np.uint32],
    targets: npt.NDArray[np.int32],
    positions: npt.NDArray[np.uint32],
    *,
    adapter: str | PathLike[str] | None = None,
    full: bool = False,
    quant_type: str | None = None,
    seed: int | None = None,
) -> tuple[npt.NDArray[np.float32], float, dict[str, npt.NDArray[np.float32]]]: ...

# ---- adapter
_Pair = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

def read_adapter(folder: str | PathLike[str]) -> tuple[str, dict[str, _Pair], list[str]]: ...
def write_adapter(
    folder: str | PathLike[str],
    config: str,
    modules: dict[str, _Pair],
    *,
    dtype: str = "float32",
    model_card: str = "",
) -> list[str]: ...
def match_targets(
    config: str,
    linear: list[str],
    *,
    other: list[str] = ...,
    output: str | None = None,
) -> tuple[list[tuple[str, tuple[int, float, float]]], list[str]]: ...

# ---- quantisation
def quantize_4bit(
    values: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    shape: list[int],
    dtype: str,
    quant_type: str,
    blocksize: int,
    double_quant: bool,
) -> dict[str, Any]: ...
def dequantize_4bit(
    weight: Quantized4bit,
    dtype: str,
    out: npt.NDArray[np.float32] | npt.NDArray[np.uint16],
    start: int,
) -> None: ...
def quant_state_to_tensors(
    name: str, weight: Quantized4bit
) -> list[tuple[str, npt.NDArray[Any]]]: ...
def quant_state_from_tensors(
    name: str, tensors: dict[str, tuple[str, list[int], npt.NDArray[np.uint8]]]
) -> dict[str, Any] | None: ...
def dynamic_map() -> npt.NDArray[np.float32]: ...

# ---- memory of CPU tensors, by address (0 for none)

def dequantize_4bit_at(
    packed: int,
    packed_len: int,
    absmax: int,
    absmax_len: int,
    nested_absmax: int,
    nested_len: int,
    nested_code: int,
    nested_offset: float,
    quant_type: str,
    blocksize: int,
    nested_blocksize: int,
    out: int,
    elements: int,
    dtype: str,
) -> None: ...
def dropout_at(values: int, out: int, len: int, p: float, seed: int, stream: int) -> None: ...

# Products with a 4-bit weight `[n, k]`; sizes are (m, n, k), addresses 0 for what is not there. On
# x86-64 alone. What they can run on here, the fastest first: "tiles", "wide", "vectors".
def cpu_product_units() -> list[str]: ...

_FourBit = tuple[
    tuple[int, int],  # packed: address, bytes
    tuple[int, int],  # absmax: address, length
    tuple[int, int, int, float, int],  # nested: absmax, length, code, offset, blocksize
    tuple[str, int, str],  # quant_type, blocksize, dtype
]

# False, and `out` unspecified, where it would not be exact.
def cpu_product_at(
    unit: str,
    backward: bool,
    sizes: tuple[int, int, int],
    dtype: str,
    input: int,
    weight: _FourBit,
    term: tuple[str, int, int, int] | None,  # dtype, r, [m, r], [n, r] or [r, k]
    bias: int,
    accumulate: bool,
    out: int,
) -> bool: ...

# The term's [m, r] is written, and sums over rows are computed beside it; False as above, of `out`
# alone.
def cpu_lora_at(
    unit: str,
    backward: bool,
    sizes: tuple[int, int, int],
    dtype: str,
    input: int,
    weight: _FourBit,
    adapter: tuple[int, int, int, int, float],  # r, [m, r], [n, r] or [r, k], A or B; scaling
    outer: list[tuple[int, int, int, int, bool]],  # [m, r], [m, columns], columns, out, transposed
    bias: int,
    accumulate: bool,
    out: int,
) -> bool: ...

# ---- threads
# Addresses of libgomp's functions of these names.
def use_openmp(gomp_parallel: int, omp_get_max_threads: int) -> None: ...

# ---- CUDA
# Device addresses, sizes and raw streams as integers; dtypes by torch's names. Nothing is allocated
# or waited for.
def cuda_driver() -> tuple[int | None, int]: ...
def cuda_devices() -> int: ...
def cuda_images() -> dict[str, bytes]: ...
def cuda_prepare(device: int) -> dict[str, Any]: ...
def cuda_dropout_mask(
    device: int,
    stream: int,
    out: int,
    dtype: str,
    elements: int,
    p: float,
    seed: int,
    index: int,
) -> None: ...

# labels, rows, ignore_index, classes
_RowLabels = tuple[int, int, int, int]

def cuda_cross_entropy_prepare(
    device: int,
    stream: int,
    labels: _RowLabels,
    reduction: str,
    divisor: int,
    lift: float,
    facts: int,
) -> None: ...
def cuda_cross_entropy(
    device: int,
    stream: int,
    logits: int,
    dtype: str,
    stride: int,
    labels: _RowLabels,
    smoothing: float,
    softcap: float,
    multiplier: int,
    losses: int,
) -> None: ...
def cuda_scale_gradient(
    device: int,
    stream: int,
    gradient: int,
    dtype: str,
    elements: int,
    scale: int,
    grad: int,
    out: int,
    out_dtype: str,
) -> None: ...

# packed, absmax, nested absmax, nested code, nested offset (the last three 0 without double
# quantisation), quant_type, blocksize, nested_blocksize
_Weight = tuple[int, int, int, int, int, str, int, int]

def cuda_dequantize_4bit(
    device: int,
    stream: int,
    weight: _Weight,
    out: int,
    dtype: str,
    n: int,
    k: int,
    transpose: bool,
) -> None: ...
def cuda_quantize_4bit(
    device: int,
    stream: int,
    values: int,
    dtype: str,
    elements: int,
    quant_type: str,
    blocksize: int,
    packed: int,
    absmax: int,
) -> None: ...
def cuda_quantize_absmax(
    device: int,
    stream: int,
    absmax: int,
    blocks: int,
    offset: int,
    code: int,
    codes: int,
    nested_absmax: int,
) -> None: ...

# gate, up, rows, columns, stride of rows in elements, dtype, activation ("silu", "gelu_tanh" or
# "gelu")
_Gated = tuple[int, int, int, int, int, str, str]

def cuda_glu(device: int, stream: int, given: _Gated, out: int) -> None: ...
def cuda_glu_backward(
    device: int,
    stream: int,
    given: _Gated,
    grad: int,
    out: int,
    grads: tuple[int, int],
    grad_stride: int,
) -> None: ...

# rows, columns, dtype, weight, whether it is f32 beside another dtype, offset, epsilon
_Normalised = tuple[int, int, str, int, bool, float, float]

# Pairs: a residual and where its sum with x goes; x and 1 / rms of its rows; a gradient and one
# that is added to x's; room for partial sums, and where the weight's gradient goes. 0 is none.
def cuda_rms_norm(
    device: int,
    stream: int,
    norm: _Normalised,
    x: int,
    residual: tuple[int, int],
    out: int,
    inverse: int,
) -> None: ...
def cuda_rms_norm_backward(
    device: int,
    stream: int,
    norm: _Normalised,
    x: tuple[int, int],
    grad: tuple[int, int],
    out: int,
    weight: tuple[int, int],
) -> None: ...
def cuda_rms_norm_partial_rows(device: int, rows: int, columns: int, dtype: str) -> int | None: ...

# read, written, strides of batch, head and position of the one and of the other, in elements
_Turned = tuple[int, int, Sequence[int], Sequence[int]]

def cuda_rope(
    device: int,
    stream: int,
    q: _Turned,
    k: _Turned,
    tables: tuple[int, int, Sequence[int]],
    sizes: tuple[int, int, int, int, int, int],
    dtype: str,
    backward: bool,
) -> None: ...

# x [m, k], m, k, dtype, planes, seed (0 without dropout), h, h_columns, the mask that is kept (0 if
# none is; `cuda_lora_kept_bytes` a row), where Hopper's kernels are used ("auto", "always",
# "never"), what forward does with LoRA terms whose weight is not given ("written" to y, "added" to
# it, or "left")
_GroupInput = tuple[int, int, int, str, int, int, int, int, int, str, str]
# (lora_A, lora_B, their dtype, n, r), (scaling, dropout_p, stream, h_column), (y, or its gradient,
# bias, lora_bias, its dtype), (gradients of lora_A, lora_B, their dtype), (weight, whether it lies
# as [k, n], the 4-bit one that it receives first); addresses are 0 for what is not there
_GroupProjection = tuple[
    tuple[int, int, str, int, int],
    tuple[float, float, int, int],
    tuple[int, int, int, str],
    tuple[int, int, str],
    tuple[int, bool, _Weight | None],
]

def cuda_lora_carries(
    device: int, m: int, w: int, depth: int, down_rows: bool
) -> tuple[bool, bool]: ...
def cuda_product(
    device: int,
    stream: int,
    dtype: str,
    x: int,
    w: int,
    out: int,
    sizes: tuple[int, int, int],
    down_rows: bool,
    together: int,
) -> None: ...
def cuda_lora_max_columns(device: int, planes: int) -> int: ...
def cuda_lora_kept_bytes(device: int, k: int, planes: int, hopper: str) -> int | None: ...
def cuda_lora_workspace(
    device: int, m: int, k: int, planes: int, sizes: list[tuple[int, int]], backward: bool
) -> int: ...
def cuda_lora_forward(
    device: int,
    stream: int,
    input: _GroupInput,
    projections: list[_GroupProjection],
    workspace: int,
) -> None: ...
def cuda_lora_forward_gated(
    device: int,
    stream: int,
    input: _GroupInput,
    projections: list[_GroupProjection],
    workspace: int,
    hidden: int,
    activation: str,
) -> None: ...
def cuda_lora_products(
    device: int,
    stream: int,
    input: _GroupInput,
    projections: list[_GroupProjection],
    workspace: int,
) -> None: ...
def cuda_lora_backward(
    device: int,
    stream: int,
    input: _GroupInput,
    projections: list[_GroupProjection],
    workspace: int,
    grad_x: int,
) -> None: ...
def cuda_small_division(
    device: int, sizes: tuple[int, int, int, int, int]
) -> tuple[int, int, int] | None: ...
def cuda_small_linear(
    device: int,
    stream: int,
    dtype: str,
    sizes: tuple[int, int, int, int, int],
    division: tuple[int, int, int],
    x_y_bias: tuple[int, int, int],
    weight: tuple[int, int, int, int, int, str, int, int],
    adapter: tuple[tuple[int, int], tuple[int, str], float, tuple[int, int, int]] | None,
) -> None: ...
