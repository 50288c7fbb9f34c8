"""How many rows of logits the linear cross-entropy holds at a time on a GPU."""

WORKSPACE = 504 << 20
"""Bytes that a chunk's logits may take."""
_TILE, _HALF_TILE = 128, 64  # rows of a tile of cuBLAS's products
_FEWEST_ROWS = 1024  # with fewer, the products wait for the weight
_TILES_AREA = 128 * 128 * 256  # elements of the gradient of x, of as many tiles as there are SMs


def chunk_rows(rows: int, width: int, row_bytes: int) -> int:
    """The fewest rows with which both products are efficient, of chunks of one size.

    Of ``rows`` rows of x, ``width`` elements each, whose logits take ``row_bytes`` a row. The
    gradient of x sums over all classes, so its tiles alone keep the device busy: with rows for one
    of each SM, as far as `WORKSPACE` goes.
    """
    most = max(1, WORKSPACE // max(1, row_bytes))
    asked = min(max(_FEWEST_ROWS, _TILES_AREA // max(1, width)), most)
    chunks = -(-rows // (asked // _TILE * _TILE or asked))
    even = -(-rows // max(1, chunks))
    return min(most, -(-even // _HALF_TILE) * _HALF_TILE)
