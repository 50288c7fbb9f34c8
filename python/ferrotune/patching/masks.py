"""Dropout by index-based masks, so that a stock model drops what a patched one drops."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops

if TYPE_CHECKING:
    from collections.abc import Iterator


class IndexDropout(nn.Dropout):
    """``nn.Dropout`` with the mask of ``ops.dropout_mask``: one ``ops.dropout_seed`` a call."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        with torch._C.DisableTorchFunction():  # the mask is f32 whatever a mode makes of dtypes
            mask = ops.dropout_mask(input.shape, self.p, ops.dropout_seed(input))
        return (input * mask).to(input.dtype)


@contextmanager
def index_dropout(model: nn.Module) -> Iterator[None]:
    """Every ``nn.Dropout`` of ``model`` applies index-based masks inside the block.

    Stock and patched model then draw the same seeds in the same order from PyTorch's generator,
    so that from the same ``manual_seed`` both drop the same elements.
    """
    swapped = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in swapped:
        module.__class__ = IndexDropout
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = nn.Dropout
