"""One set of threads for native operations and PyTorch."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_adopted = False


def share_with_torch() -> bool:
    """Lets native operations run on PyTorch's own OpenMP threads, where the process has them.

    Threads of rayon's would compete for the cores with PyTorch's, which go on spinning after each
    of its operations: two to three times slower, measured on two cores. ``torch.set_num_threads``
    then holds for native operations too. True if it is so now; without PyTorch, or with one built
    on another OpenMP library than libgomp, nothing changes.
    """
    global _adopted
    if _adopted or "torch" not in sys.modules:
        return _adopted
    library = _libgomp()
    if library is None:
        return False
    from ferrotune import _native

    addresses = [
        ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0
        for name in ("GOMP_parallel", "omp_get_max_threads")
    ]
    _native.use_openmp(*addresses)
    _adopted = True
    return True


def _libgomp() -> ctypes.CDLL | None:
    """The libgomp that PyTorch brought, as it lies in memory; never a second copy."""
    no_load = getattr(os, "RTLD_NOLOAD", None)
    file = getattr(sys.modules["torch"], "__file__", None)
    if no_load is None or file is None:
        return None
    found = []
    for path in sorted((Path(file).parent / "lib").glob("libgomp*.so*")):
        try:
            found.append(ctypes.CDLL(str(path), mode=os.RTLD_NOW | no_load))
        except OSError:
            continue  # on disk, but not loaded
    return found[0] if len(found) == 1 else None
