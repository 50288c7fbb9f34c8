"""Which of the processes that torchrun started this one is. Needs no PyTorch."""

import os

# The end of a message of which the first process has told the reason.
SAID_ELSEWHERE = "its own output says why"


def rank() -> int:
    """This process's number, from 0; 0 without torchrun."""
    return _number("RANK", 0)


def local() -> int:
    """This process's number among those of its machine, from 0."""
    return _number("LOCAL_RANK", 0)


def count() -> int:
    """How many processes there are; 1 without torchrun."""
    return max(1, _number("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process shows progress and writes files."""
    return rank() == 0


def _number(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError:
        return default
