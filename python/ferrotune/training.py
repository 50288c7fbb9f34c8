"""A training run from Python's side: the folder, the events, the report."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import files, report
from .history import History
from .options import SettingError
from .progress import Display, open_display
from .results import TrainInterrupted, TrainResult
from .verdict import judge

OnEvent = Callable[[dict[str, Any]], bool | None]

# Settings that are about how a run is called, not about what it computes.
_NOT_OF_THE_RUN = ("progress",)

# Events that come after the checkpoint of a resumed run was found to fit these settings.
_OF_A_STARTED_RUN = ("step", "eval", "checkpoint", "stop")


def run(
    settings: dict[str, Any],
    default_output: str,
    on_event: OnEvent | None,
    tables: Mapping[str, Any],
) -> TrainResult:
    """Trains with complete, checked settings and leaves the report in the run's folder.

    `tables` are the data in memory, by the names that stand for them in the settings.
    """
    from . import _native

    show = bool(settings["progress"])
    settings = {name: v for name, v in settings.items() if name not in _NOT_OF_THE_RUN}
    output = _output(settings, default_output)
    settings["output"] = str(output)
    relay = _Relay(settings, open_display(show, _title(settings)), on_event, tables)
    try:
        found = json.loads(_native.train(json.dumps(settings), relay, dict(tables)))
    except KeyboardInterrupt:
        raise _interrupted(output) from None
    finally:
        relay.display.close()
    if relay.interrupted:
        raise _interrupted(output)
    history = relay.history(output)
    result = TrainResult.from_native(settings["method"], found, settings["seed"])
    result = dataclasses.replace(result, verdict=judge(history))
    report.write(result, settings, history, relay.fingerprints)
    return result


def _title(settings: Mapping[str, Any]) -> str:
    return f"{settings['method']} fine-tuning of {Path(settings['model']).name}"


def _output(settings: Mapping[str, Any], default: str) -> Path:
    given = settings["output"]
    if settings["resume"]:
        folder = Path(given or default)
        # A crash while checkpoints change places leaves the older one aside; the engine finds it.
        if not any((folder / name).is_dir() for name in ("checkpoint", "checkpoint.old")):
            raise SettingError(f"{folder} has no checkpoint to resume from; give its --output")
        return folder
    if given is None:
        return files.free_sibling(Path(default))
    folder = Path(given)
    if files.is_taken(folder):
        raise SettingError(
            f"{folder} is not empty: give a new output folder, or resume the run that is in it"
        )
    return folder


def _interrupted(output: Path) -> TrainInterrupted:
    if not (output / "checkpoint").is_dir():
        return TrainInterrupted("before the first checkpoint", output)
    return TrainInterrupted(
        f"a checkpoint is in {output / 'checkpoint'}; "
        f"go on with: ferrotune train --config {output / 'config.toml'} --resume",
        output,
    )


class _Relay:
    """What the engine calls with each event: display, history, the user's own function."""

    def __init__(
        self,
        settings: dict[str, Any],
        display: Display,
        on_event: OnEvent | None,
        tables: Mapping[str, Any],
    ):
        self._tables = tables
        self.display = display
        self.interrupted = False
        self.fingerprints: list[report.Fingerprint] = []
        self._settings = settings
        self._on_event = on_event
        self._events = History()
        self._files: list[str] = []
        self._started = False

    def __call__(self, line: str) -> bool:
        try:
            event = json.loads(line)
            kind = event.get("event")
            if kind == "data":
                self._files = event["files"]
            elif not self._started and kind in _OF_A_STARTED_RUN:
                self._start()
            self._events.add(event)
            self._show(event)
            answer = self._on_event(event) if self._on_event is not None else None
        except KeyboardInterrupt:
            # Ctrl-C came while Python ran: stopping after this step writes the checkpoint.
            self.interrupted = True
            return False
        return answer is not False and not self.interrupted

    def _start(self) -> None:
        """Data, model and the checkpoint of a resumed run fit: config.toml may change."""
        self._started = True
        self.fingerprints = report.fingerprints(
            [path for path in self._files if path not in self._tables]
        )
        report.write_config(Path(self._settings["output"]), self._settings)

    def _show(self, event: dict[str, Any]) -> None:
        """A display that breaks (a closed pipe, a dead notebook front end) ends no run."""
        try:
            self.display.event(event)
        except Exception as error:
            self.display = Display()
            with contextlib.suppress(OSError):
                print(f"progress display ended: {error}", file=sys.stderr)

    def history(self, output: Path) -> History:
        """The whole run's numbers, those before a resumption included."""
        try:
            return History.read(output / "metrics.jsonl")
        except OSError:
            return self._events
