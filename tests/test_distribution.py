"""The sdist and the wheel as users get them: contents, tags, what they link, a clean installation.

`FERROTUNE_WHEEL` names a wheel built already by `make wheel`'s command; without it one is built,
which takes a release build of everything.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MIB = 2**20
# What every glibc system has; ld-linux is the loader itself.
LIBRARIES = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libpthread.so.0", "libdl.so.2"}
LOADER = "ld-linux-x86-64.so.2"


def run(*words: object, cwd: Path = ROOT, timeout: int = 1800) -> str:
    """Standard output; a failure shows what the command said."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False,
        timeout=timeout, stdin=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tool(name: str, *words: object) -> str:
    pytest.importorskip(name, reason="a tool of the group `dev`")
    return run(sys.executable, "-m", name, *words)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if named := os.environ.get("FERROTUNE_WHEEL"):
        return Path(named).resolve(strict=True)
    pytest.importorskip("ziglang", reason="a tool of the group `dev`")
    folder = tmp_path_factory.mktemp("wheel")
    manylinux = ("--zig", "--compatibility", "manylinux_2_28")
    tool("maturin", "build", "--release", *manylinux, "--out", folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tool("maturin", "sdist", "--out", folder)
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment that holds the wheel and its dependencies only."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/python", "-m", "pip", "install", "-q", wheel)
    return folder / "bin"


def test_wheel_tags_and_size(wheel: Path) -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "Cargo.toml").read_text(), re.MULTILINE)
    assert version
    assert wheel.name == f"ferrotune-{version[1]}-cp310-abi3-manylinux_2_28_x86_64.whl"
    assert wheel.stat().st_size < 15_000_000


def test_wheel_contents(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        sizes = {one.filename: one.file_size for one in archive.infolist() if not one.is_dir()}
        texts = [name for name in sizes if not name.startswith("ferrotune/")]
        assert not [name for name in texts if str(ROOT).encode() in archive.read(name)]
        (metadata_name,) = (name for name in sizes if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata_name).decode())
    package = {str(file.relative_to(ROOT / "python")) for file in sources()}
    extension = "ferrotune/_native.abi3.so"
    info = metadata_name.removesuffix("METADATA")
    assert {name for name in sizes if not name.startswith(info)} == package | {extension}
    assert {
        f"{info}licenses/LICENSE",
        f"{info}licenses/python/ferrotune/data/LICENSE-python-docs.txt",
        f"{info}entry_points.txt",
    } <= set(sizes)
    data = {name: size for name, size in sizes.items() if name.startswith("ferrotune/data/")}
    assert sum(data.values()) < 8 * MIB
    assert {
        "ferrotune/data/SOURCES.md",
        "ferrotune/data/LICENSE-python-docs.txt",
        "ferrotune/data/kjv.parquet",
        "ferrotune/data/docs-heldout.parquet",
        "ferrotune/data/demo-model/model.safetensors",
        "ferrotune/data/demo-model/tokenizer.json",
    } <= set(data)
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "torch", "compare", "tensorboard", "notebook", "test", "dev"
    }  # fmt: skip
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert not [line for line in needed if re.match("torch|nvidia|triton", line)]


def sources() -> list[Path]:
    """The package's files under version control, or all but build products without it."""
    skipped = {"__pycache__", "_native.abi3.so"}
    files = (ROOT / "python/ferrotune").rglob("*")
    return [file for file in files if file.is_file() and not skipped & set(file.parts)]


def test_wheel_is_what_its_tag_says(wheel: Path) -> None:
    shown = tool("auditwheel", "show", wheel)
    assert re.search(r'constrains the platform tag to\s+"manylinux_2_(5|12|17|28)_', shown), shown


def test_extension_links_the_c_library_only(wheel: Path, tmp_path: Path) -> None:
    elffile = pytest.importorskip("elftools.elf.elffile", reason="comes with auditwheel")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("ferrotune/_native.abi3.so", tmp_path)
    with open(library, "rb") as file:
        elf = elffile.ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        assert "libc.so.6" in needed
        assert needed <= LIBRARIES | {LOADER}
        assert elf.get_section_by_name(".symtab") is None  # stripped


def test_twine_accepts_both(wheel: Path, sdist: Path) -> None:
    tool("twine", "check", "--strict", wheel, sdist)


def test_sdist_contents(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    assert {
        "Cargo.toml", "Cargo.lock", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md",
        "PKG-INFO",
    } <= names  # fmt: skip
    assert {str(file.relative_to(ROOT)) for file in sources()} <= names
    assert {str(file.relative_to(ROOT)) for file in (ROOT / "src").rglob("*.rs")} <= names
    stray = [name for name in names if name.startswith(("target/", "tests/", "benches/"))]
    stray += [name for name in names if name.endswith((".so", ".pyc"))]
    assert stray == []
    assert sdist.stat().st_size < 10 * MIB


def test_sdist_resolves_as_locked(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    run("cargo", "metadata", "--locked", "--format-version=1", "--quiet", cwd=folder)


def test_installed_version(installed: Path, wheel: Path, tmp_path: Path) -> None:
    version = wheel.name.split("-")[1]
    assert run(installed / "ferrotune", "--version", cwd=tmp_path) == f"ferrotune {version}\n"


def test_installed_import_is_light(installed: Path, tmp_path: Path) -> None:
    """Wall time of `import ferrotune` in a fresh process, without the interpreter's start."""
    code = (
        "import sys, time; start = time.perf_counter(); import ferrotune; "
        "took = time.perf_counter() - start; "
        "print(took, *{'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    times = []
    for _ in range(7):
        took, *heavy = run(installed / "python", "-c", code, cwd=tmp_path).split()
        assert not heavy
        times.append(float(took))
    assert statistics.median(times) < 0.1, times
    listed = run(installed / "python", "-m", "pip", "list", "--format=freeze")
    assert not re.search("^(torch|nvidia|triton)", listed, re.MULTILINE)


def test_installed_extension_loads(installed: Path, tmp_path: Path) -> None:
    code = (
        "import numpy as np, ferrotune; x = np.linspace(-1, 1, 640, dtype=np.float32); "
        "y = ferrotune.dequantize_4bit(ferrotune.quantize_4bit(x)); print(abs(x - y).max())"
    )
    assert 0 < float(run(installed / "python", "-c", code, cwd=tmp_path)) < 0.2


def test_installed_demo(installed: Path, tmp_path: Path) -> None:
    """The whole demo, optimised as users get it: the fall of the held-out loss that it promises."""
    shown = run(installed / "ferrotune", "demo", "--no-progress", cwd=tmp_path)
    assert "held-out loss" in shown
    folder = tmp_path / "ferrotune-demo"
    for name in ("adapter/adapter_config.json", "metrics.jsonl", "curves.png", "README.md"):
        assert (folder / name).stat().st_size > 0
    results = json.loads((folder / "results.json").read_text())["result"]
    assert results["heldout_loss_best"] <= results["heldout_loss_before"] - 1.0
