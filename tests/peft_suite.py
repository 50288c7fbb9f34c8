"""Runs PEFT's own tests/test_custom_models.py, stock and then with every LoRA model patched.

    python tests/peft_suite.py PATH [--tests FILE] [-- arguments for pytest]

PATH is PEFT's source distribution (the .tar.gz, or unpacked) or a clone of its repository. Each
test must end as it did unpatched, a failed one for the same reason, and no plain LoRA linear layer
may run by PEFT's forward; else the exit status is 1. Prints how many layers ran through ferrotune
and through PEFT, and why, and the reasons for which tests fail in both runs alike.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import types
from collections import Counter
from importlib import util
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

MODE = "FERROTUNE_PEFT_SUITE"
# Reasons that the tests themselves bring about, in layers that are otherwise ferrotune's.
ASKED_FOR = (
    "its adapters are disabled",
    "its adapters are merged",
    "none of its adapters is active",
    "adapter_names",
    "not plain LoRA",
    "that ferrotune has no forward for",
    "lora.MultiheadAttention merges it",
)
# What tests lack that fail in both runs, by marks of their errors: neither PEFT nor ferrotune is at
# fault then.
LACKING = {
    "the hub": (
        "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError", "ConnectionError",
        "couldn't connect to",
    ),
    "a package": ("ModuleNotFoundError", "ImportError"),
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tests", default="test_custom_models.py")
    parser.add_argument("pytest", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tests = _tests(options.path, Path(folder))
        found = {}
        for mode in ("stock", "patched"):
            print(f"=== {mode}", flush=True)
            found[mode] = _run(mode, tests / options.tests, Path(folder), options.pytest)
    return _judge(found["stock"], found["patched"])


def _tests(path: Path, folder: Path) -> Path:
    """A copy of PEFT's tests folder that is a package, as its relative imports need."""
    if path.is_file():
        with tarfile.open(path) as archive:
            archive.extractall(folder / "source", filter="data")
        path = next((folder / "source").iterdir())
    target = folder / "tests"  # a warning that a test expects names the package
    shutil.copytree(path / "tests", target)
    (target / "__init__.py").touch()
    return target


def _run(mode: str, tests: Path, folder: Path, more: list[str]) -> dict[str, Any]:
    results = folder / f"{mode}.json"
    # Without a hub the tests that need one fail at once, in both runs.
    environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **os.environ}
    environment |= {MODE: f"{mode}:{results}", "PYTHONPATH": _python_path()}
    subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-c", os.devnull,
            "--rootdir", str(tests.parent.parent), "-p", "no:cacheprovider", "-p", "peft_suite",
            "-W", "ignore", "--show-capture=no", "-rN", *more, str(tests),
        ],
        env=environment, cwd=folder, check=False,
    )  # fmt: skip
    if not results.exists():
        raise SystemExit(f"the {mode} run came to no end")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def _python_path() -> str:
    here = Path(__file__).resolve().parent
    return os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])


def _judge(stock: dict[str, Any], patched: dict[str, Any]) -> int:
    before, after = stock["outcomes"], patched["outcomes"]
    ends = [_ends(found) for found in (stock, patched)]
    changed = {
        name: tuple(end.get(name) for end in ends)
        for name in sorted({*before, *after})
        if ends[0].get(name) != ends[1].get(name)
    }
    layers, forwards = patched["layers"], patched["forwards"]
    print(f"\nstock:   {dict(Counter(before.values()))}")
    print(f"patched: {dict(Counter(after.values()))}")
    for name, (was, is_) in changed.items():
        print(f"  CHANGED {name}: {was} -> {is_}\n    {patched['texts'].get(name, '')}")
    _print_failures([name for name in stock["reasons"] if name not in changed], stock["reasons"])
    print(f"{layers['ferrotune']} LoRA layers ran through ferrotune, {layers['PEFT']} only PEFT's")
    print(f"{forwards.pop('', 0)} forwards by ferrotune; by PEFT:")
    missed = 0
    for reason, count in sorted(forwards.items(), key=lambda item: -item[1]):
        expected = any(known in reason for known in ASKED_FOR)
        missed += 0 if expected else count
        print(f"  {count:6} {'' if expected else 'MISSED '}{reason}")
    good = not changed and not missed and layers["ferrotune"] > 0
    print("every test ends as it did unpatched, and every plain layer is ferrotune's" if good else
          f"{len(changed)} tests changed, {missed} forwards missed")  # fmt: skip
    return 0 if good else 1


def _ends(found: dict[str, Any]) -> dict[str, str]:
    """How every test ended; of one that failed, for which reason, too."""
    reasons = found["reasons"]
    return {
        name: f"{outcome}: {reasons[name]}" if name in reasons else outcome
        for name, outcome in found["outcomes"].items()
    }


def _print_failures(names: list[str], reasons: dict[str, str]) -> None:
    """Groups of the tests that fail stock and patched alike."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(reasons[name], []).append(name)
    lacking = Counter(_lacking(reasons[name]) or "nothing known" for name in names)
    print(f"{len(names)} tests fail in both runs, each for one reason; they lack {dict(lacking)}:")
    for reason, tests in sorted(groups.items(), key=lambda item: -len(item[1])):
        print(f"  {len(tests):6} {reason}\n         such as {tests[0].rpartition('::')[2]}")


def _lacking(reason: str) -> str | None:
    found = (what for what, marks in LACKING.items() if any(mark in reason for mark in marks))
    return next(found, None)


# ---- inside pytest: `-p peft_suite`


def _reason(error: BaseException) -> str:
    """The first error of a chain; addresses in its message are left out."""
    seen = {id(error)}
    while (cause := error.__cause__ or error.__context__) is not None and id(cause) not in seen:
        seen.add(id(cause))
        error = cause
    line = (str(error).strip() or "no message").splitlines()[0]
    line = re.sub(r"https?://\S+|0x[0-9a-f]+", "…", line)
    return f"{type(error).__name__}: {line[:200]}"


class Suite:
    """Takes down how each test ended and, in the patched run, who ran each LoRA layer."""

    def __init__(self, patched: bool, results: Path):
        self.results = results
        self.outcomes: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.reasons: dict[str, str] = {}
        self._errors: dict[str, str] = {}
        self.forwards: Counter[str] = Counter()
        self.layers: Counter[str] = Counter()
        self._seen: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
        if patched:
            self._take_over()

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None:
            self._errors[item.nodeid] = _reason(call.excinfo.value)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome
            if report.failed:
                self.reasons[report.nodeid] = self._errors.get(report.nodeid, "no error")
                self.texts[report.nodeid] = str(report.longrepr)[-1500:]

    def pytest_sessionfinish(self) -> None:
        found = {
            "outcomes": self.outcomes,
            "texts": self.texts,
            "reasons": self.reasons,
            "forwards": dict(self.forwards),
            "layers": {"ferrotune": self.layers["ferrotune"], "PEFT": self.layers["PEFT"]},
        }
        self.results.write_text(json.dumps(found))

    def _take_over(self) -> None:
        """Patches every model as its LoRA layers are made, and each layer before its first call."""
        from peft.tuners import lora

        import ferrotune
        from ferrotune.patching import PatchError, runs

        suite = self
        inject = lora.LoraModel.inject_adapter

        @functools.wraps(inject)
        def injected(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            made = inject(self, model, *args, **kwargs)
            # Still on the meta device, or without a LoRA linear.
            with contextlib.suppress(PatchError):
                ferrotune.patch(model)
            return made

        lora.LoraModel.inject_adapter = injected
        runs._listeners.append(lambda layer, reason: suite.ran(layer, reason or ""))
        for cls in {*lora.LoraLayer.__subclasses__()}:
            self._watch(cls, ferrotune, PatchError)

    def _watch(self, cls: Any, ferrotune: Any, error: type[Exception]) -> None:
        from ferrotune.patching.classes import Replaced

        suite, stock = self, cls.__dict__.get("forward")
        if stock is None:
            return

        @functools.wraps(stock)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(self, Replaced):
                return stock(self, *args, **kwargs)  # its reason was taken down already
            try:
                left = ferrotune.patch(self).left
                reason = left[0].reason if left else ""
            except error as refused:
                reason = str(refused)
            if isinstance(self, Replaced):
                return type(self).forward(self, *args, **kwargs)
            suite.ran(self, reason)
            return stock(self, *args, **kwargs)

        cls.forward = forward

    def ran(self, layer: Any, reason: str) -> None:
        self.forwards[reason] += 1
        seen = self._seen.setdefault(layer, set())
        owner = "PEFT" if reason else "ferrotune"
        if owner == "ferrotune" and owner not in seen:
            self.layers["ferrotune"] += 1
            self.layers["PEFT"] -= 1 if "PEFT" in seen else 0
        elif not seen:
            self.layers["PEFT"] += 1
        seen.add(owner)


def pytest_configure(config: Any) -> None:
    mode, _, results = os.environ.get(MODE, "").partition(":")
    if not mode:
        return
    if util.find_spec("diffusers") is None:
        # PEFT's common tests import one name of it, which the tests run here never use.
        stand_in = types.ModuleType("diffusers")
        stand_in.__spec__ = ModuleSpec("diffusers", None)
        stand_in.StableDiffusionPipeline = object  # type: ignore[attr-defined]
        sys.modules["diffusers"] = stand_in
    config.pluginmanager.register(Suite(mode == "patched", Path(results)), "ferrotune-suite")


if __name__ == "__main__":
    sys.exit(main())
