"""What a comparison's numbers say of fine-tuning against retrieval, in words."""

from collections.abc import Sequence

from ..tables import size
from .result import TUNED, Contender


def guide(contenders: Sequence[Contender], measure: str) -> str:
    """One paragraph a contender that matters, each with the numbers that it rests on."""
    others, tuned = contenders[:-1], contenders[-1]
    sign = 1.0 if measure == "accuracy" else -1.0
    said = []
    if others:
        best = max(others, key=lambda one: sign * one.quality.value)
        what = "retrieval" if best.name.startswith("BM25") else "the best of the others"
        said.append(_against(what, best, tuned, sign))
    retrieval = [one for one in others if one.name.startswith("BM25")]
    if retrieval and not best.name.startswith("BM25"):
        best = max(retrieval, key=lambda one: sign * one.quality.value)
        said.append(_against("retrieval", best, tuned, sign))
    said.append(_cost(others, tuned))
    said.append(
        "Beyond these numbers: retrieval takes new and corrected records at once and can show "
        "what it rests on; a fine-tuned model has to be trained again, needs no search and no long "
        "prompt, and keeps a manner or a format better than facts. The two can be combined. The "
        "numbers hold for texts like these alone, and for one training run."
    )
    return "\n\n".join(said)


def _against(what: str, other: Contender, tuned: Contender, sign: float) -> str:
    difference = other.difference
    assert difference is not None
    low, high = difference.low, difference.high
    numbers = (
        f"{tuned.quality.value:.3f} against {other.quality.value:.3f}, a difference of "
        f"{difference.value:+.3f} ({low:+.3f} to {high:+.3f})"
    )
    if min(sign * low, sign * high) > 0:
        return f"**Fine-tuning beats {what}** ({other.name}): {numbers}."
    if max(sign * low, sign * high) < 0:
        return (
            f"**Fine-tuning is worse than {what}** ({other.name}): {numbers}. Take that, unless "
            "more data or a longer run changes it."
        )
    return (
        f"**Fine-tuning and {what} cannot be told apart** ({other.name}): {numbers}. The cheaper "
        "one will do, or more test records may tell."
    )


def _cost(others: Sequence[Contender], tuned: Contender) -> str:
    fastest = min((*others, tuned), key=lambda one: one.seconds_per_example)
    smallest = min((*others, tuned), key=lambda one: one.bytes)
    return (
        f"An example takes the {TUNED} model {1000 * tuned.seconds_per_example:.3g} ms and "
        f"{size(tuned.bytes)} of weights; the fastest is {fastest.name} "
        f"({1000 * fastest.seconds_per_example:.3g} ms), the smallest {smallest.name} "
        f"({size(smallest.bytes)})."
    )
