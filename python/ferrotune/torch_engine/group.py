"""The processes of a run, and what they say to each other."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ranks
from ..options import SettingError

# The first process reads and checks all data before the others hear of it; one that ends is noticed
# at once, whatever the limit.
_PATIENCE = timedelta(days=1)


class Group:
    """This process's place among those of the run; one alone says and hears nothing.

    Collective calls must be made by all processes, in one order.
    """

    def __init__(self) -> None:
        self.rank, self.size = ranks.rank(), ranks.count()
        self.device = _device()
        self._own = False
        self.failed = False  # whether a process fell out of step, so that none may be spoken to
        if self.size > 1 and not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
            self._own = True

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mine(self, rows: int) -> slice:
        """This process's share of so many rows."""
        return slice(self.rank, rows, self.size)

    def tell(self, message: Any) -> None:
        """Said by the first process, to all others."""
        if self.size > 1:
            dist.broadcast_object_list([message], src=0, device=torch.device("cpu"))

    def hear(self) -> Any:
        """What the first process said next."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, device=torch.device("cpu"))
        return heard[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place and as the result."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def spread(self, tensor: Tensor) -> None:
        """Overwrites every process's tensor with the first one's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def close(self) -> None:
        if self._own and dist.is_initialized():
            dist.destroy_process_group()


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = ranks.local()
    if index >= torch.cuda.device_count():
        raise SettingError(
            f"process {index} of this machine has no GPU of its own: there are "
            f"{torch.cuda.device_count()}; start as many processes as there are GPUs"
        )
    return torch.device("cuda", index)
