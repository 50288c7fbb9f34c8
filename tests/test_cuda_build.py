"""The CUDA kernels without a device: how they were compiled, and what users are told."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ferrotune
from ferrotune import _native

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not _native.has_cuda, reason="built without the CUDA kernels")


@pytest.fixture(scope="module")
def resources() -> ModuleType:
    path = ROOT / "kernels/resources.py"
    spec = importlib.util.spec_from_file_location("resources", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resources"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def usages(resources: ModuleType) -> list[object]:
    program = resources.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump (triton's wheel has one)")
    return resources.inspect(program)  # type: ignore[no-any-return]


def test_no_kernel_spills(usages: list[object]) -> None:
    spilled = [usage for usage in usages if usage.local]  # type: ignore[attr-defined]
    assert spilled == []


def test_every_chip_has_every_kernel(usages: list[object]) -> None:
    by_chip: dict[str, set[str]] = {}
    for usage in usages:
        if not usage.file.endswith("_sm90a"):  # type: ignore[attr-defined]
            by_chip.setdefault(usage.chip, set()).add(usage.kernel)  # type: ignore[attr-defined]
    assert {"80", "90", "100", "120"} <= by_chip.keys()
    assert all(kernels == by_chip["90"] for chip, kernels in by_chip.items() if chip != "90a")


MMA_SYNC = ("90", {"HMMA", "LDSM", "LDGSTS"})
HOPPERS_OWN = ("90a", {"HGMMA", "UTMALDG"})


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *[(file, MMA_SYNC) for file in ("lora_down", "lora_up", "lora_outer", "lora_down_outer")],
        ("linear_small_sm90a", ("90a", {"HMMA", "LDS"})),
        *[(file, HOPPERS_OWN) for file in ("gemm_sm90a", "lora_down_sm90a", "lora_outer_sm90a")],
    ],
)
def test_products_run_on_tensor_cores(
    resources: ModuleType, file: str, how: tuple[str, set[str]]
) -> None:
    program = resources.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump (triton's wheel has one)")
    chip, needed = how
    found = resources.instructions(program, file, chip)
    assert found
    for kernel, used in found.items():
        assert needed <= used, kernel
        assert not {"LDL", "STL"} & used, kernel


def test_few_rows_run_as_their_number_asks(resources: ModuleType) -> None:
    """Up to eight tokens by a warp's products, more by a warpgroup's."""
    program = resources.cuobjdump()
    if program is None:
        pytest.skip("no cuobjdump (triton's wheel has one)")
    for kernel, used in resources.instructions(program, "linear_small_sm90a", "90a").items():
        few = kernel.endswith("_8")
        assert ("HGMMA" in used) == (not few), kernel
        assert not few or "LDGSTS" in used, kernel


def test_the_table_is_current(resources: ModuleType, usages: list[object]) -> None:
    text = resources.TABLE.read_text(encoding="utf-8")
    missing = {usage.kernel for usage in usages if f" {usage.kernel} " not in text}  # type: ignore[attr-defined]
    assert not missing, f"python kernels/resources.py writes {resources.TABLE}"


def test_images_hold_no_paths() -> None:
    for name, image in _native.cuda_images().items():
        assert str(ROOT).encode() not in image, name


def test_without_a_driver_one_clear_error() -> None:
    version, needed = _native.cuda_driver()
    if version is not None:
        pytest.skip("there is a driver")
    assert needed == 13_000
    assert _native.cuda_devices() == 0
    with pytest.raises(ferrotune.CudaError, match="no NVIDIA driver") as caught:
        _native.cuda_prepare(0)
    assert caught.value.code == 100
    assert ferrotune.CudaError.code == 0
    assert isinstance(caught.value, RuntimeError)


def test_doctor_without_a_device() -> None:
    found = ferrotune.doctor()
    text = str(found)
    assert found.kernels_built
    assert ferrotune.__version__ in text
    if found.driver is None:
        assert "not found; the kernels need one for CUDA 13.0 (580 series) or newer" in text
        assert found.devices == ()


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p must be in \[0, 1\], not 1.5"):
        _native.cuda_dropout_mask(0, 0, 0, "float32", 8, 1.5, 0, 0)
    with pytest.raises(NotImplementedError, match="float64"):
        _native.cuda_dropout_mask(0, 0, 0, "float64", 8, 0.5, 0, 0)
