"""Rebuilds bitsandbytes_4bit.safetensors: 4-bit weights as bitsandbytes saves them, and what it makes of them.

Run from the repository's root: python tests/data/make_bitsandbytes.py
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from safetensors.torch import save_file

# 64 columns: bitsandbytes 0.50.2 dequantises wrongly on a CPU where a row does not end with a block.
CASES = {"nf4_double": ("nf4", True, torch.bfloat16), "fp4_plain": ("fp4", False, torch.float16)}


def main() -> None:
    torch.manual_seed(0)
    tensors = {}
    for name, (quant_type, double, dtype) in CASES.items():
        layer = bnb.nn.Linear4bit(64, 20, bias=False, quant_type=quant_type, compress_statistics=double)
        layer.weight = bnb.nn.Params4bit(
            torch.randn(20, 64, dtype=dtype), requires_grad=False, quant_type=quant_type, compress_statistics=double
        )
        layer.to("cpu")
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in layer.state_dict().items()}
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        tensors[f"{name}.expected"] = expected.float().contiguous()
    save_file(tensors, "tests/data/bitsandbytes_4bit.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
