"""What every test may ask for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from error_table import ErrorTable


@pytest.fixture(scope="session")
def error_table() -> Iterator[ErrorTable]:
    """Errors against float64; see `error_table.py`."""
    table = ErrorTable()
    yield table
    table.write()
