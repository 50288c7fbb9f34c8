"""What a finished run leaves beside its weights: settings, results, curves, and the model cards."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import card, environment
from .config import to_toml
from .files import fingerprint, write_atomic
from .history import History
from .results import TrainResult
from .version import version


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """A data file as it was when the run began: size in bytes, SHA-256 of its content."""

    path: str
    size: int
    sha256: str


def fingerprints(paths: Sequence[str]) -> list[Fingerprint]:
    """Of every data file of the run. Raises OSError."""
    return [Fingerprint(path, *fingerprint(Path(path))) for path in paths]


def write_config(folder: Path, settings: Mapping[str, Any]) -> None:
    """`config.toml`: every setting, so that `ferrotune train --config` runs it again."""
    header = (
        f"ferrotune {version()}\n"
        f"again:    ferrotune train --config {folder / 'config.toml'}\n"
        f"continue: ferrotune train --config {folder / 'config.toml'} --resume"
    )
    stored = {**settings, "resume": False}
    write_atomic(folder / "config.toml", to_toml(stored, header))


def title(settings: Mapping[str, Any]) -> str:
    """What a run is called on its displays, plots and pages."""
    return f"{settings['method']} fine-tuning of {Path(settings['model']).name}"


def write(
    result: TrainResult,
    settings: Mapping[str, Any],
    history: History,
    data: Sequence[Fingerprint],
) -> None:
    """Writes results.json, report.html, curves.png (bias.png) and the cards of run and weights."""
    from . import run_page
    from .plots import save_curves

    folder = result.output
    name = title(settings)
    found = environment.describe()
    write_atomic(folder / "results.json", results_json(result, settings, data, found))
    save_curves(history, folder / "curves.png", name)
    if result.bias is not None:
        from .bias_plot import bias_figure
        from .plots import png

        write_atomic(folder / "bias.png", png(bias_figure(result.bias)))
    files = [(one.path, one.size, one.sha256) for one in data]
    page = run_page.render(name, result, settings, history, files, found)
    write_atomic(folder / "report.html", page)
    write_atomic(folder / "README.md", card.render(result, settings, files, in_weights=False))
    if result.weights.is_dir() and result.weights != folder:
        write_atomic(result.weights / "README.md", card.render(result, settings, files))


def results_json(
    result: TrainResult,
    settings: Mapping[str, Any],
    data: Sequence[Fingerprint],
    made_on: Mapping[str, str],
) -> str:
    """The result, the settings, the data's fingerprints and the environment as one JSON object."""
    files = [{"path": one.path, "bytes": one.size, "sha256": one.sha256} for one in data]
    content = {
        "ferrotune": version(),
        "result": {
            **result.to_dict(),
            "perplexity_before": _finite(result.perplexity_before),
            "perplexity_best": _finite(result.perplexity_best),
        },
        "settings": dict(settings),
        "files": files,
        "environment": dict(made_on),
    }
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: float | None) -> float | None:
    return value if value is not None and value < float("inf") else None
