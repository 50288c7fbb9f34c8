"""What `verify` found, typed, as text and as JSON."""

from __future__ import annotations

import html
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Difference:
    """The stock model against the patched one, over all tensors of one kind and dtype.

    Relative differences and errors of a tensor are Frobenius norms: ``‖a - b‖ / ‖b‖``.
    """

    kind: str
    """"output" or "gradient"."""
    dtype: str
    tensors: int
    max_absolute: float
    """Largest ``|patched - stock|`` of an element."""
    max_relative: float
    """Largest relative difference of a tensor."""
    worst: str
    """The tensor with that."""
    stock_error: float | None
    """Largest relative error of a stock tensor against float64; None where that did not run."""
    patched_error: float | None
    """The same of a patched tensor."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result of `verify`; ``failures`` are the tensors that speak against ``passed``."""

    passed: bool
    failures: tuple[str, ...]
    rule: str
    """What a tensor had to satisfy."""
    differences: tuple[Difference, ...]
    loss_stock: float
    loss_patched: float
    loss_float64: float | None
    float64: str
    """"run", or why the float64 copy was not."""
    layers: dict[str, tuple[int, int]]
    """By kind of layer: how many run through ferrotune, and all of them."""
    own_forward: dict[str, int]
    """Forwards of patched layers that the library's own forward did, by reason."""
    filled: int
    """lora_B that were zero and held small random values during the run, so that the LoRA term
    and the gradients of lora_A were not all zero."""
    device: str
    autocast: str | None
    dropout: bool
    """Whether a dropout was active: both models then ran under the same masks."""
    versions: dict[str, str]

    def json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False) + "\n"

    def save(self, path: Path) -> None:
        """Writes `json` to ``path``, which holds the whole file or is left as it was."""
        from ..files import write_atomic

        write_atomic(path, self.json())

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        return "\n".join([self._title(), *(f"  {line}" for line in self._lines())])

    def _repr_html_(self) -> str:
        lines = "".join(f"<div>{html.escape(line)}</div>" for line in self._lines())
        return f'<div style="font-weight:600">{html.escape(self._title())}</div>{lines}'

    def _title(self) -> str:
        layers = " and ".join(
            f"{ours} of {all_} {kind}" for kind, (ours, all_) in self.layers.items()
        )
        verdict = "agrees with the stock model" if self.passed else "DIFFERS from the stock model"
        return f"ferrotune ({layers} layers) {verdict}"

    def _lines(self) -> list[str]:
        lines = [f"loss: stock {self.loss_stock:.8g}, patched {self.loss_patched:.8g}"]
        for found in self.differences:
            text = (
                f"{found.tensors} {found.dtype} {found.kind}s: largest difference "
                f"{found.max_absolute:.2e}, relative {found.max_relative:.2e} ({found.worst})"
            )
            if found.stock_error is not None and found.patched_error is not None:
                text += (
                    f"; error against float64: stock {found.stock_error:.2e}, "
                    f"patched {found.patched_error:.2e}"
                )
            lines.append(text)
        if self.float64 != "run":
            lines.append(f"float64 did not run: {self.float64}")
        lines += [
            f"{count} forwards by their own: {why}" for why, count in self.own_forward.items()
        ]
        return [*lines, *(f"FAILED {failure}" for failure in self.failures)]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
