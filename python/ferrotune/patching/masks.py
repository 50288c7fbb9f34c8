"""Dropout by index-based masks, so that a stock model drops what a patched one drops."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .. import ops
from .architectures import members_of
from .sharing import SHARED, SharedSeed

if TYPE_CHECKING:
    from collections.abc import Iterator


class IndexDropout(nn.Dropout):
    """``nn.Dropout`` with the mask of ``ops.dropout_mask``: one ``ops.dropout_seed`` a call, or of
    the calls of a group."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return input
        with torch._C.DisableTorchFunction():  # the mask is f32 whatever a mode makes of dtypes
            shared = self.__dict__.get(SHARED)
            if shared is None:
                seed, stream = ops.dropout_seed(input), 0
            else:
                seeds, stream, adapter = shared
                seed = seeds.take(adapter, stream, input)
            mask = ops.dropout_mask(input.shape, self.p, seed, stream)
        return (input * mask).to(input.dtype)


@contextmanager
def index_dropout(model: nn.Module, *, blocks: bool = True) -> Iterator[None]:
    """Every ``nn.Dropout`` of ``model`` applies index-based masks inside the block.

    ``blocks`` is as it was for `patch`: whether layers that share an input share a seed.

    Stock and patched model then draw the same seeds in the same order from PyTorch's generator,
    so that from the same ``manual_seed`` both drop the same elements.
    """
    swapped = [module for module in model.modules() if type(module) is nn.Dropout]
    for module in swapped:
        module.__class__ = IndexDropout
    grouped = _share(model) if blocks else []
    try:
        yield
    finally:
        for module in swapped:
            module.__class__ = nn.Dropout
        for dropout in grouped:
            del dropout.__dict__[SHARED]


def _share(model: nn.Module) -> list[nn.Module]:
    """Lets the dropouts of layers that a block runs as a group share their seeds, by adapter."""
    found: list[nn.Module] = []
    for module in model.modules():
        seeds = SharedSeed()
        for i, member in enumerate(members_of(module)):
            for name, dropout in getattr(member, "lora_dropout", {}).items():
                if isinstance(dropout, IndexDropout):
                    dropout.__dict__[SHARED] = (seeds, i, name)
                    found.append(dropout)
    return found
