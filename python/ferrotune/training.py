"""A training run from Python's side: the folder, the events, the report."""

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, ranks, repeats, report
from .event_files import EventFiles
from .history import History
from .options import SettingError
from .progress import Display, open_display
from .repeats import Repeat
from .results import TrainInterrupted, TrainResult
from .verdict import judge

if TYPE_CHECKING:
    from .torch_engine.choice import Choice
    from .torch_engine.session import Session

OnEvent = Callable[[dict[str, Any]], bool | None]

# Settings that are about how a run is called, not about what it computes.
_NOT_OF_THE_RUN = ("progress",)
# Settings that are this side's alone.
_NOT_OF_THE_ENGINE = ("tensorboard", "repeats")

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
    show = bool(settings["progress"])
    settings = {name: v for name, v in settings.items() if name not in _NOT_OF_THE_RUN}
    repeats.check(settings)
    choice = _choose(settings, default_output)
    if not ranks.is_first():
        from .torch_engine.session import follow

        return follow()
    settings["engine"] = choice.name
    with _computing(choice) as engine:
        settings["output"] = str(_output(settings, default_output))
        result, write = _once(settings, show, on_event, tables, engine)
        if settings["repeats"] > 1 and result.stop_reason != "interrupted":
            again = _again(settings, show, on_event, tables, engine)
            result = dataclasses.replace(result, repeats=again)
            write(result)
        if engine.session is not None:
            engine.session.result = result
    return result


@dataclasses.dataclass(frozen=True, slots=True)
class _Engine:
    """What computes, why, and PyTorch's part in it."""

    why: str
    session: "Session | None"


def _choose(settings: Mapping[str, Any], default_output: str) -> "Choice":
    """A resumed run keeps the engine that it began with, unless another is asked for."""
    from .config import read_toml
    from .torch_engine.choice import Choice, choose

    asked = settings["engine"]
    if settings["resume"] and asked == "auto":
        config = Path(settings["output"] or default_output) / "config.toml"
        began = read_toml(config).get("engine") if config.is_file() else None
        if began in ("embedded", "torch"):
            return Choice(choose(began, settings["method"]).name, "the run began with it")
    return choose(asked, settings["method"])


@contextlib.contextmanager
def _computing(choice: "Choice") -> Iterator[_Engine]:
    if choice.name == "embedded":
        yield _Engine(choice.why, None)
        return
    from .torch_engine.session import Session

    with Session() as session:
        yield _Engine(choice.why, session)


def _again(
    settings: Mapping[str, Any],
    show: bool,
    on_event: OnEvent | None,
    tables: Mapping[str, Any],
    engine: _Engine,
) -> tuple[Repeat, ...]:
    """The first run and those under the next seeds, which are made where they are not over."""
    output = Path(settings["output"])
    runs = [repeats.finished(output)]
    for number in range(1, settings["repeats"]):
        own = repeats.settings_of(settings, number)
        folder = Path(own["output"])
        if repeats.finished(folder) is None:
            if not own["resume"] and folder.is_dir():  # ended before its first checkpoint
                shutil.rmtree(folder)
            try:
                _once(
                    own,
                    show,
                    on_event,
                    tables,
                    engine,
                    f", run {number + 1} of {settings['repeats']}",
                )
            except TrainInterrupted:
                raise _interrupted(output) from None
        run = repeats.finished(folder)
        if run is None:  # the user's function ended it
            break
        runs.append(run)
    return tuple(run for run in runs if run is not None)


def _once(
    settings: dict[str, Any],
    show: bool,
    on_event: OnEvent | None,
    tables: Mapping[str, Any],
    computing: _Engine,
    which: str = "",
) -> tuple[TrainResult, Callable[[TrainResult], None]]:
    """One run and its report, and what writes the report of a result that knows more."""
    from . import _native

    output = Path(settings["output"])
    events = EventFiles(output / "tensorboard") if settings["tensorboard"] else None
    relay = _Relay(
        settings, open_display(show, report.title(settings) + which), events, on_event, tables
    )
    engine = {name: v for name, v in settings.items() if name not in _NOT_OF_THE_ENGINE}
    try:
        if computing.session is not None:
            computing.session.settle(settings)
        found = json.loads(
            _native.train(
                json.dumps(engine),
                relay,
                dict(tables),
                why=computing.why,
                learners=computing.session,
            )
        )
    except KeyboardInterrupt:
        raise _interrupted(output) from None
    finally:
        relay.close()
    if relay.interrupted:
        raise _interrupted(output)
    history = relay.history(output)
    result = TrainResult.from_native(settings["method"], found, settings["seed"])
    result = dataclasses.replace(result, verdict=judge(history))

    def write(known: TrainResult) -> None:
        report.write(known, settings, history, relay.fingerprints)

    write(result)
    return result, write


def _output(settings: Mapping[str, Any], default: str) -> Path:
    given = settings["output"]
    if settings["resume"]:
        folder = Path(given or default)
        if not repeats.resumable(folder):
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
    """What the engine calls with each event: display, history, event files, the user's function."""

    def __init__(
        self,
        settings: dict[str, Any],
        display: Display,
        event_files: EventFiles | None,
        on_event: OnEvent | None,
        tables: Mapping[str, Any],
    ):
        self._tables = tables
        self.display = display
        self.interrupted = False
        self.fingerprints: list[report.Fingerprint] = []
        self._settings = settings
        self._event_files = event_files
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
            if self._event_files is not None:
                self._event_files.event(event)
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

    def close(self) -> None:
        self.display.close()
        if self._event_files is not None:
            self._event_files.close()

    def history(self, output: Path) -> History:
        """The whole run's numbers, those before a resumption included."""
        try:
            return History.read(output / "metrics.jsonl")
        except OSError:
            return self._events
