"""An evaluation with demonstrations in the prompt: a comparison's few-shot contender on its own."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..few_shot import Draw, FewShot
from ..metrics import Interval
from ..options import SettingError
from ..resampling import Floats, intervals
from ..results import EvaluateResult
from . import records
from .contenders import Said, Scorer, class_of, folder_size, takes_prompts
from .judging import judge
from .prompts import Record, answer, fixed_examples, question

NAMES = ("demonstrations", "data")


def evaluate(settings: Mapping[str, Any], tables: Mapping[str, Any]) -> EvaluateResult:
    """`repeats` draws of `shots` demonstrations, from `seed` on, each in every prompt.

    Raises SettingError for what cannot be asked so.
    """
    shots, repeats, seed = (settings[name] for name in ("shots", "repeats", "seed"))
    check(settings)
    shown, _ = records.read(settings, settings["demonstrations"], tables)
    test, skipped = records.read(settings, settings["data"], tables)
    records.check(shown, test, NAMES, "an evaluation with shots")
    if shots > len(shown):
        raise SettingError(
            f"shots is {shots}, but demonstrations hold {len(shown)} records: give fewer shots, or "
            "more demonstrations"
        )
    pairs = {(question(one), answer(one)) for one in shown}
    both = sum((question(one), answer(one)) in pairs for one in test)
    if both:
        raise SettingError(
            f"{both} of {len(test)} data records are in demonstrations too, with their answers: "
            "give demonstrations apart, as `ferrotune split` writes them"
        )
    draws = [fixed_examples(shown, shots, seed + number) for number in range(repeats)]
    labels = sorted({answer(one) for one in shown}) if "label" in test[0] else []
    # One call, so that the model is loaded once.
    said = Scorer(settings).asked(
        "",
        settings["model"],
        settings["adapter"],
        list(test) * repeats,
        [draw for draw in draws for _ in test],
        labels,
        folder_size(settings["model"]),
    )
    parts = [_part(said, at * len(test), (at + 1) * len(test)) for at in range(repeats)]
    measures = _measures(parts, test, labels, seed)
    few = FewShot(shots, tuple(Draw(seed + at, found) for at, found in enumerate(measures)))
    loss = float(np.mean([found["loss"].value for found in measures]))
    tokens = len(test) if said.tokens is None else int(said.tokens.sum()) // repeats
    return EvaluateResult(
        loss=loss,
        perplexity=math.exp(loss),
        bits_per_byte=None,
        tokens=tokens,
        seconds=said.seconds,
        tokens_per_second=tokens * repeats / said.seconds,
        skipped=skipped,
        few_shot=few,
    )


def check(settings: Mapping[str, Any]) -> None:
    """Raises SettingError for settings that make no sense together, and for a model."""
    if not settings["demonstrations"]:
        raise SettingError("shots needs demonstrations: files of records to put into the prompt")
    for name, what in (
        ("shots", "leave it out to ask the model without demonstrations"),
        ("repeats", "it is the number of draws"),
    ):
        if settings[name] < 1:
            raise SettingError(f"{name} must be at least 1, not {settings[name]}: {what}")
    for name in ("eval_tokens", "messages_column"):
        if settings[name] is not None:
            raise SettingError(f"{name} is not for an evaluation with shots: leave it out")
    kind = class_of(settings["model"])
    if not takes_prompts(kind):
        raise SettingError(
            f"{settings['model']} is a {kind}, no language model: it takes no demonstrations; "
            "leave shots out"
        )
    if settings["adapter"] is not None and _classifies(Path(settings["adapter"])):
        raise SettingError(
            f"{settings['adapter']} makes a classifier of the model, which takes no "
            "demonstrations; leave shots out"
        )


def _classifies(adapter: Path) -> bool:
    """Whether an adapter has a classifier's head. A folder without an adapter is the engine's."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        heads = config.get("modules_to_save") or ()
        return config.get("task_type") == "SEQ_CLS" or bool({"score", "classifier"} & {*heads})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _part(said: Said, begin: int, end: int) -> Said:
    """What was said of some of the records."""
    cut = [None if one is None else one[begin:end] for one in (said.loss, said.tokens, said.losses)]
    return Said(said.name, said.seconds, said.size, said.predicted[begin:end], *cut)


def _measures(
    parts: Sequence[Said], test: Sequence[Record], labels: Sequence[str], seed: int
) -> list[dict[str, Interval]]:
    """Of each draw, from the same resamples of the records."""
    contenders = judge(parts, test, seed)
    if not labels:
        return [{"loss": one.quality} for one in contenders]
    truth = np.array([labels.index(answer(one)) for one in test])

    def mean(weights: Floats, values: Any) -> Floats:
        return np.asarray(values @ weights / weights.sum())

    chosen = np.array([_choice(one.losses, truth) for one in parts])
    found = []
    for one, loss in zip(contenders, intervals(chosen, mean, seed), strict=True):
        assert one.macro_f1 is not None
        found.append({"loss": loss, "accuracy": one.quality, "macro_f1": one.macro_f1})
    return found


def _choice(losses: Any, truth: Any) -> Floats:
    """Nats of the right label `[records]`, the model choosing among the labels `[records, n]`."""
    least = losses.min(1, keepdims=True)
    total = np.log(np.exp(least - losses).sum(1)) - least[:, 0]
    return np.asarray(losses[np.arange(len(truth)), truth] + total)
