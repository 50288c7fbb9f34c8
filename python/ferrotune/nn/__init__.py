"""LoRA and 4-bit linear layers as ordinary modules, with PEFT's and bitsandbytes' state dicts."""

from .linear4bit import Linear4bit
from .lora import LoraLinear, LoraLinear4bit

__all__ = ["Linear4bit", "LoraLinear", "LoraLinear4bit"]
