"""What `patch` did, layer by layer, for a terminal and for Jupyter."""

from __future__ import annotations

import html
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .memory_report import MemoryReport

LORA, FOUR_BIT, LOSS = "LoRA", "4-bit", "loss"  # the kinds that are no blocks
_COUNTED = {LOSS: "{} of {} losses"}
_HEADINGS = ("layers", "name", "class", "adapters", "now")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One layer that ferrotune could take over."""

    name: str
    """Its name in ``model.named_modules()``."""
    kind: str
    """"LoRA", "4-bit" or "loss"; of a block "norm", "MLP", "attention", "decoder layer" or
    "activation"."""
    layer: str
    """Its class and base: ``lora.Linear4bit on Linear4bit nf4``."""
    details: str
    """Its adapters with rank and dropout, the compute dtype of a 4-bit layer, the size of the head
    that a loss is of, a block's parts."""
    replaced_by: str | None
    """What runs it now; None where it keeps its own forward."""
    reason: str | None
    """Why it keeps its own forward; None where it is replaced."""
    note: str | None = None
    """What of a replaced layer stays the library's own, or why its latest forward was."""

    @property
    def replaced(self) -> bool:
        return self.replaced_by is not None

    @property
    def outcome(self) -> str:
        if self.replaced_by is None:
            owner = "PEFT" if self.kind == LORA else "its own forward"
            return f"{owner}: {self.reason}"
        return f"ferrotune {self.replaced_by}" + (f" ({self.note})" if self.note else "")


@dataclass(frozen=True, slots=True)
class PatchReport:
    """All layers of a model that `patch` looked at; prints as a table.

    Truth value: whether at least one layer runs through ferrotune.
    """

    layers: tuple[LayerReport, ...]
    blocks: tuple[LayerReport, ...] = ()
    """What stands around the layers and runs through ferrotune on CUDA, or why it does not."""

    memory: MemoryReport | None = None
    """What ``memory`` made of the layers; it is filled in as the model trains."""

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        """Layers that run through ferrotune."""
        return tuple(layer for layer in self.layers if layer.replaced)

    @property
    def left(self) -> tuple[LayerReport, ...]:
        """Layers that keep their own forward; each has its reason."""
        return tuple(layer for layer in self.layers if not layer.replaced)

    def counts(self, kind: str) -> tuple[int, int]:
        """Those of a kind ("LoRA", "4-bit", "loss") that run through ferrotune, and all of it."""
        found = [layer for layer in self.layers if layer.kind == kind]
        return sum(layer.replaced for layer in found), len(found)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "blocks": [asdict(block) for block in self.blocks],
            "memory": None if self.memory is None else self.memory.as_dict(),
        }

    def __bool__(self) -> bool:
        return bool(self.replaced)

    def __str__(self) -> str:
        rows = [_HEADINGS, *self._rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
        lines = [self._summary()]
        for row in rows:
            first = row[0].rjust(widths[0])
            rest = (text.ljust(width) for text, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join(["", first, *rest]).rstrip())
        if self.memory is not None:
            lines.append(str(self.memory))
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<PatchReport: {self._summary()}>"

    def _repr_html_(self) -> str:
        left = "text-align:left;padding:2px 12px 2px 0;vertical-align:top"
        head = "".join(f'<th style="{left};opacity:.7">{heading}</th>' for heading in _HEADINGS)
        body = "".join(
            "<tr>"
            + "".join(f'<td style="{left}">{html.escape(text)}</td>' for text in row)
            + "</tr>"
            for row in self._rows()
        )
        return (
            f'<div style="font-weight:600">{html.escape(self._summary())}</div>'
            f'<table style="margin:4px 0"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table>"
            + ("" if self.memory is None else f"<div>{html.escape(str(self.memory))}</div>")
        )

    def _summary(self) -> str:
        kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
        parts = (
            _COUNTED.get(kind, "{} of {} {} layers").format(*self.counts(kind), kind)
            for kind in kinds
        )
        return f"ferrotune runs {' and '.join(parts)}"

    def _rows(self) -> list[tuple[str, ...]]:
        """Layers that differ in their number only share a row; what was left comes first, blocks
        last."""
        groups: dict[tuple[str, ...], int] = {}
        for layer in (*self.left, *self.replaced, *self.blocks):
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
            key = (pattern, layer.layer, layer.details, layer.outcome)
            groups[key] = groups.get(key, 0) + 1
        return [(str(count), *key) for key, count in groups.items()]
