"""What every test may ask for."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from error_table import ErrorTable

# Before anything imports torch: of several workers each gets its part of the cores, which threads
# that spin while they wait would take from the others.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))


@pytest.fixture(scope="session")
def error_table() -> Iterator[ErrorTable]:
    """Errors against float64; see `error_table.py`."""
    table = ErrorTable()
    yield table
    table.write()
