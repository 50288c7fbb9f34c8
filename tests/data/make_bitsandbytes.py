"""Rebuilds bitsandbytes_4bit.safetensors: 4-bit weights and what bitsandbytes makes of them.

Run from the repository's root: python tests/data/make_bitsandbytes.py
"""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from safetensors.torch import save_file

# 64 columns: where a row does not end with a block, bitsandbytes 0.50.2 dequantises wrongly on a
# CPU.
CASES = {"nf4_double": ("nf4", True, torch.bfloat16), "fp4_plain": ("fp4", False, torch.float16)}


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (quant_type, double, dtype) in CASES.items():
        values = torch.randn(20, 64, dtype=dtype)
        layer = Linear4bit(  # type: ignore[no-untyped-call]
            64, 20, bias=False, quant_type=quant_type, compress_statistics=double
        )
        layer.weight = Params4bit(
            values, requires_grad=False, quant_type=quant_type, compress_statistics=double
        )
        layer.to("cpu")
        saved = layer.state_dict().items()
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in saved}
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        tensors[f"{name}.expected"] = expected.float().contiguous()
    save_file(tensors, "tests/data/bitsandbytes_4bit.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
