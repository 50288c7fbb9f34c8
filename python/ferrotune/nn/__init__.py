"""LoRA and 4-bit linear layers as ordinary modules, with PEFT's and bitsandbytes' state dicts.

And the loss of a linear head.
"""

from .linear4bit import Linear4bit
from .lora import LoraLinear, LoraLinear4bit
from .loss import LinearCrossEntropyLoss

__all__ = ["Linear4bit", "LinearCrossEntropyLoss", "LoraLinear", "LoraLinear4bit"]
