"""The contenders of a comparison: what each one says of every test record."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..options import SettingError
from .prompts import Record, answer, asked, fixed_examples, in_context
from .retrieval import Neighbours, regression, vote

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Said:
    """One contender on the test records, in order.

    `predicted` are labels, and `losses` `[records, labels]` a language model's summed nats of each;
    `loss` and `tokens` its summed nats and number of tokens of each answer that is a text.
    `seconds` is what all records took, models and indices being ready; `size` is what must be kept,
    in bytes.
    """

    name: str
    seconds: float
    size: int
    predicted: tuple[str, ...] = ()
    loss: Floats | None = None
    tokens: Floats | None = None
    losses: Floats | None = None


class Scorer:
    """Asks the engine for the losses of answers, and for a classifier's labels."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def evaluate(
        self, model: str, adapter: str | None, records: Sequence[Record], **changes: Any
    ) -> tuple[dict[str, Any], float]:
        """What the engine says of each record, and the seconds it took.

        Raises SettingError where it leaves records out.
        """
        from .. import _native

        warnings: list[str] = []

        def relay(line: str) -> bool:
            event = json.loads(line)
            if event["event"] == "warning":
                warnings.append(event["message"])
            return True

        names = ("quant_type", "blocksize", "double_quant", "sequence_length", "batch_size")
        shared = {name: self._settings[name] for name in (*names, "seed", "threads")}
        columns = ("text", "prompt", "completion", "messages", "label")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "records.jsonl")
            file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
            config = {
                **shared,
                **{f"{name}_column": None for name in columns},
                "model": model,
                "adapter": adapter,
                "data": [str(file)],
                "packing": False,
                "eval_tokens": None,
                "records": True,
                **changes,
            }
            try:
                found = json.loads(_native.evaluate(json.dumps(config), relay, {}))
                left_out = found["skipped"] or len(found["records"]["loss"]) != len(records)
            except ValueError as error:
                if str(file) not in str(error):
                    raise
                warnings, left_out = [str(error)], True  # no record was left
        if left_out:
            raise SettingError(
                "the engine cannot score every test record: raise sequence_length "
                f"({self._settings['sequence_length']}), or lower shots. It says: "
                + "; ".join(warnings).replace(str(file), "the prompts")
            )
        return dict(found["records"]), float(found["seconds"])

    def answers(
        self, name: str, model: str, adapter: str | None, pairs: Sequence[Record], size: int
    ) -> Said:
        """A language model's losses of completions."""
        found, seconds = self.evaluate(model, adapter, pairs)
        return Said(
            name, seconds, size, loss=np.array(found["loss"]), tokens=np.array(found["tokens"])
        )

    def labels(
        self,
        name: str,
        model: str,
        adapter: str | None,
        prompts: Sequence[str],
        labels: Sequence[str],
        size: int,
    ) -> Said:
        """The label that a language model finds likeliest behind each prompt."""
        pairs = [{"prompt": prompt, "completion": label} for prompt in prompts for label in labels]
        found, seconds = self.evaluate(model, adapter, pairs)
        losses = np.array(found["loss"]).reshape(len(prompts), len(labels))
        predicted = tuple(labels[at] for at in losses.argmin(1))
        return Said(name, seconds, size, predicted, losses=losses)

    def asked(
        self,
        name: str,
        model: str,
        adapter: str | None,
        test: Sequence[Record],
        examples: Sequence[Sequence[Record]],
        labels: Sequence[str],
        size: int,
    ) -> Said:
        """A language model with examples in the prompt of each record; `labels` are its choice."""
        prompts = [in_context(one, own) for one, own in zip(test, examples, strict=True)]
        if "label" in test[0]:
            return self.labels(name, model, adapter, prompts, labels, size)
        pairs = [
            {"prompt": prompt, "completion": answer(record)}
            for prompt, record in zip(prompts, test, strict=True)
        ]
        return self.answers(name, model, adapter, pairs, size)

    def classes(
        self, name: str, model: str, adapter: str | None, test: Sequence[Record], size: int
    ) -> Said:
        """A classification model's labels."""
        found, seconds = self.evaluate(model, adapter, test)
        names = found["labels"]
        return Said(name, seconds, size, tuple(names[at] for at in found["predicted"]))


def folder_size(folder: str) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def class_of(model: str) -> str:
    """The class that config.json names. Raises OSError and SettingError."""
    return str((_json(Path(model) / "config.json").get("architectures") or [""])[0])


def positions(model: str, adapter: str | None) -> int | None:
    """How many tokens of a text a model takes, beside an adapter's virtual ones.

    None where config.json does not say it. Raises OSError and SettingError.
    """
    config = _json(Path(model) / "config.json")
    most = config.get("max_position_embeddings", config.get("n_positions"))
    own = _json(Path(adapter) / "adapter_config.json") if adapter is not None else {}
    return int(most) - int(own.get("num_virtual_tokens") or 0) if most else None


def _json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise SettingError(f"{file} is no JSON object: {error}") from None


def takes_prompts(kind: str) -> bool:
    """Whether a model of this class is a language model."""
    return kind.endswith(("ForCausalLM", "LMHeadModel"))


def ask_all(
    settings: Mapping[str, Any],
    train: Sequence[Record],
    test: Sequence[Record],
    tell: Callable[[str], None],
) -> tuple[list[Said], dict[str, str]]:
    """Every contender that can be asked, the fine-tuned one last; and why the others cannot."""
    scorer = Scorer(settings)
    base, adapter = settings["model"], settings["adapter"]
    size = folder_size(base)
    tuned = settings["tuned"] or base
    tuned_size = folder_size(tuned) + (folder_size(adapter) if adapter else 0)
    seed, shots = settings["seed"], settings["shots"]
    tell("indexing the training records")
    index = Neighbours(train)
    begin = time.perf_counter()
    near = index.nearest(test, max(shots, settings["neighbours"]))
    searching = time.perf_counter() - begin
    # The nearest example stands last, next to the question.
    found_examples = [own[:shots][::-1] for own in near]
    given = fixed_examples(train, shots, seed)
    contexts: dict[str, tuple[Sequence[Sequence[Record]], float, int]] = {
        "base model": ([[]] * len(test), 0.0, size),
        f"few-shot ({shots})": ([given] * len(test), 0.0, size),
        f"BM25 in the prompt ({shots})": (found_examples, searching, size + index.bytes),
    }
    said: list[Said] = []
    left_out: dict[str, str] = {}
    classifies = "label" in test[0]
    labels = sorted({answer(one) for one in train})
    kind = class_of(base)
    if classifies and kind.endswith("ForSequenceClassification"):
        tell("base model")
        try:
            said.append(scorer.classes("base model", base, None, test, size))
        except ValueError as error:
            left_out["base model"] = str(error)
        del contexts["base model"]
    for name, (examples, extra, bytes_) in contexts.items():
        if not takes_prompts(kind):
            left_out[name] = f"{kind} is no language model: it takes no prompt, and has no head"
            if name != "base model":
                left_out[name] = f"{kind} is no language model: it takes no prompt"
            continue
        tell(name)
        one = scorer.asked(name, base, None, test, examples, labels, bytes_)
        said.append(replace(one, seconds=one.seconds + extra))
    if classifies:
        count = settings["neighbours"]
        voted = tuple(vote(own[:count]) for own in near)
        said.append(Said(f"BM25 vote ({count})", searching, index.bytes, voted))
        tell("TF-IDF + logistic regression")
        predicted, seconds, bytes_ = regression(train, test, seed)
        said.append(Said("TF-IDF + logistic regression", seconds, bytes_, tuple(predicted)))
    else:
        why = "the answers are texts, not labels"
        left_out |= {"nearest-neighbour vote": why, "TF-IDF + logistic regression": why}
    tell("fine-tuned")
    if classifies:
        said.append(scorer.classes("fine-tuned", tuned, adapter, test, tuned_size))
    else:
        pairs = [{"prompt": asked(one), "completion": answer(one)} for one in test]
        said.append(scorer.answers("fine-tuned", tuned, adapter, pairs, tuned_size))
    return said, left_out
