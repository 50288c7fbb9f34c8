"""PEFT and bitsandbytes models run through ferrotune, in place (`ferrotune.patch`).

How a layer is taken over, and why so:

- The class of each layer instance is swapped for a subclass made from its own class. Nothing of
  PEFT, bitsandbytes or transformers is replaced or patched as a whole, nothing happens at import
  time, models that were not given to `patch` never change, and `unpatch` is exact.
- PEFT's plug-in point, ``LoraConfig._register_custom_module``, acts while adapters are being made,
  for the one config object it was called on, and is lost on saving. A patch must serve models
  that exist already, and must give PEFT's own layers back; so it is not used.
- bitsandbytes' entry point ``bitsandbytes.backends`` with ``torch.library.register_kernel`` would
  exchange its 4-bit kernels for every model of the process as soon as bitsandbytes is imported.
  It is not used either: patched 4-bit layers read the quantised weight where it lies.
"""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError(
        "ferrotune.patch and ferrotune.verify need PyTorch: pip install 'ferrotune[torch]'"
    ) from error

from .certificate import Certificate, Difference
from .comparison import verify
from .errors import PatchError, UnsupportedLayerError
from .memory_report import MemoryReport
from .patcher import patch, unpatch
from .report import LayerReport, PatchReport
from .runs import listening

__all__ = [
    "Certificate",
    "Difference",
    "LayerReport",
    "MemoryReport",
    "PatchError",
    "PatchReport",
    "UnsupportedLayerError",
    "listening",
    "patch",
    "unpatch",
    "verify",
]

_ = _torch
