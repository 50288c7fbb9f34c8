"""Tests that need a CUDA device, and are skipped without one.

Those that take the fixture `device` run on another with FERROTUNE_TEST_DEVICE=cpu, where they hold
the operations in plain PyTorch to the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

DEVICE = torch.device(os.environ.get("FERROTUNE_TEST_DEVICE", "cuda"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            # `poison` asks for warnings where PyTorch itself is not deterministic.
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))
            elsewhere = DEVICE.type != "cuda" and "device" in getattr(item, "fixturenames", ())
            if skip is not None and not elsewhere:
                item.add_marker(skip)


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(params=["always", "never"])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the kernels that only Hopper has are used."""
    monkeypatch.setattr("ferrotune.ops.cuda_lora.hopper", request.param)
    return request.param


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
