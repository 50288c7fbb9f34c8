"""A run's numbers as TensorBoard event files, by tensorboardX: without TensorBoard and PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .history import number
from .options import SettingError

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

_SECTIONS = {"step": "train", "eval": "heldout"}
# Keys of an event that are no course over the steps.
_LEFT_OUT = {"event", "step", "total_steps", "best", "elapsed_seconds", "remaining_seconds"}


class EventFiles:
    """Writes every number of the step and eval events as `train/...` and `heldout/...`.

    A run that goes on from a checkpoint hides what it had written after that step. Raises
    SettingError where tensorboardX is missing.
    """

    def __init__(self, folder: Path) -> None:
        try:
            import tensorboardX  # noqa: F401
        except ImportError:
            raise SettingError(
                "tensorboard needs the package tensorboardX: pip install 'ferrotune[tensorboard]'"
            ) from None
        self._folder = folder
        self._writer: SummaryWriter | None = None

    def event(self, event: Mapping[str, Any]) -> None:
        """Takes one event of the engine; those without numbers over the steps are ignored."""
        section, step = _SECTIONS.get(event.get("event", "")), event.get("step")
        if section is None or step is None:
            return
        writer = self._open(step)
        for name, value in event.items():
            if name in _LEFT_OUT or isinstance(value, bool | str | Mapping):
                continue
            if value is None or isinstance(value, int | float):
                writer.add_scalar(f"{section}/{name}", number(value), step)

    def close(self) -> None:
        """Leaves the files complete. More than one call does no harm."""
        if self._writer is not None:
            self._writer.close()

    def _open(self, step: int) -> "SummaryWriter":
        """Opened with the first number: its step is where this part of the run begins."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            # A file is named by the second it was opened in: one run must not overwrite another's.
            suffix = f".from-{step}"
            self._writer = SummaryWriter(str(self._folder), purge_step=step, filename_suffix=suffix)
        return self._writer
