"""Native operations on PyTorch's own threads."""

import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import sys
import numpy as np
from ferrotune import dequantize_4bit, quantize_4bit, threads
rng = np.random.default_rng(0)
array = rng.standard_normal((517, 1031)).astype(np.float16)
alone = quantize_4bit(array)
values = dequantize_4bit(alone)
assert not threads.share_with_torch(), "torch is not imported yet"
import torch
assert threads.share_with_torch() == (sys.platform == "linux")
assert "libgomp" in open("/proc/self/maps").read()
for count in (1, 2, 5):
    torch.set_num_threads(count)
    shared = quantize_4bit(array)
    assert np.array_equal(shared.packed, alone.packed), count
    assert np.array_equal(shared.absmax, alone.absmax), count
    assert np.array_equal(dequantize_4bit(shared), values), count
copies = sum("libgomp" in line and "r-x" in line for line in open("/proc/self/maps"))
print("libgomp mapped", copies)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is PyTorch's on Linux")
def test_values_are_the_same_on_torchs_threads() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "libgomp mapped 1\n", "no second copy of the library"


def test_a_null_address_is_refused() -> None:
    from ferrotune import _native

    with pytest.raises(ValueError, match="not 0"):
        _native.use_openmp(0, 1)


def test_an_error_on_torchs_threads_is_still_an_error() -> None:
    pytest.importorskip("torch")
    from ferrotune import quantize_4bit, threads

    threads.share_with_torch()
    array = np.ones((300, 1024), dtype=np.float32)
    array[299, 5] = np.inf
    with pytest.raises(ValueError, match=r"element 306181 .* inf"):
        quantize_4bit(array)
