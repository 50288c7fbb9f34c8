"""The trainer's batches as a transformers model reads them, with the trainer's own boundaries.

A document begins where its position is 0. Padding is a token at position 0 that is alone and has no
target, or what follows a row's last target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    Array = NDArray[np.int64]

IGNORE = -100


class Tokens(NamedTuple):
    """A batch's share: `ids`, `targets` and `positions`, all ``[rows, columns]``."""

    ids: Array
    targets: Array
    positions: Array

    def part(self, rows: slice) -> Tokens:
        return Tokens(self.ids[rows], self.targets[rows], self.positions[rows])


class Inputs(NamedTuple):
    """What a model is given; `mask` and `positions` are None where its own defaults are right."""

    ids: Tensor  # [rows, columns]
    targets: Tensor  # [rows, columns]
    mask: Tensor | None  # causal: [rows, 1, columns, columns] bool; else [rows, columns] of 1 and 0
    positions: Tensor | None  # [rows, columns]
    owner: Tensor  # [rows]: the row of the batch that a row belongs to


def of_texts(batch: Tokens, device: torch.device, apart: bool) -> Inputs:
    """Of a language model. `apart` gives each document a row of its own."""
    starts, padding = _documents(batch)
    if apart:
        return _apart(batch, starts & ~padding, padding, device)
    columns = np.arange(batch.ids.shape[1])
    packed = not ((batch.positions == columns) | padding).all()
    mask = None
    if packed:
        number = np.cumsum(starts, axis=1)
        same = number[:, :, None] == number[:, None, :]
        mask = torch.from_numpy((same & np.tri(len(columns), dtype=bool))[:, None]).to(device)
    owner = np.arange(len(batch.ids))
    positions = batch.positions if packed else None
    return _inputs(batch.ids, batch.targets, mask, positions, owner, device)


def of_labelled(batch: Tokens, device: torch.device, causal: bool) -> tuple[Inputs, Tensor, Tensor]:
    """Of a classifier: with each row's number of tokens and label, ``[rows]``.

    A row's label is its last target, and stands at its last token.
    """
    rows, columns = batch.targets.shape
    found = batch.targets != IGNORE
    last = columns - 1 - np.argmax(found[:, ::-1], axis=1)
    has = found.any(axis=1)
    lengths = np.where(has, last + 1, columns)
    labels = np.where(has, batch.targets[np.arange(rows), last], IGNORE)
    mask = None
    if not causal:  # a causal model's tokens do not see what follows them
        mask = torch.from_numpy((np.arange(columns) < lengths[:, None]).astype(np.int64)).to(device)
    inputs = _inputs(batch.ids, batch.targets, mask, None, np.arange(rows), device)
    return inputs, torch.from_numpy(lengths).to(device), torch.from_numpy(labels).to(device)


def _documents(batch: Tokens) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where documents start, padding's tokens among them; and which tokens are padding."""
    starts = batch.positions == 0
    starts[:, 0] = True
    after = np.ones_like(starts)
    after[:, :-1] = starts[:, 1:]
    padding = starts & after & (batch.targets == IGNORE)
    padding[:, 0] = False
    return starts, padding


def _apart(
    batch: Tokens, starts: NDArray[np.bool_], padding: NDArray[np.bool_], device: torch.device
) -> Inputs:
    """Each document as a row, padded at its end."""
    parts = []
    for row in range(len(batch.ids)):
        begins = np.flatnonzero(starts[row]).tolist()
        end = int(np.flatnonzero(~padding[row])[-1]) + 1
        parts += [(row, *part) for part in zip(begins, [*begins[1:], end], strict=True)]
    columns = max(end - begin for _, begin, end in parts)
    ids = np.zeros((len(parts), columns), np.int64)
    targets = np.full((len(parts), columns), IGNORE, np.int64)
    for at, (row, begin, end) in enumerate(parts):
        ids[at, : end - begin] = batch.ids[row, begin:end]
        targets[at, : end - begin] = batch.targets[row, begin:end]
    owner = np.array([row for row, *_ in parts], np.int64)
    return _inputs(ids, targets, None, None, owner, device)


def _inputs(
    ids: Array,
    targets: Array,
    mask: Tensor | None,
    positions: Array | None,
    owner: Array,
    device: torch.device,
) -> Inputs:
    def moved(array: Array) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    placed = None if positions is None else moved(positions)
    return Inputs(moved(ids), moved(targets), mask, placed, moved(owner))
