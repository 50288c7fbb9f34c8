"""Tests that need a CUDA device, and are skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = None
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            # `poison` asks for warnings where PyTorch itself is not deterministic.
            item.add_marker(pytest.mark.filterwarnings("ignore:.*deterministic"))
            if skip is not None:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """What `torch.empty` returns is full of NaN, or of the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)
