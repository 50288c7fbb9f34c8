"""Chat templates beside transformers: every template in the trl wheel, byte for byte."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ferrotune import _native

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

Messages = list[dict[str, Any]]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city – now.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city's name"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                    "days": {"type": "integer", "default": 3, "minimum": 0.5},
                },
                "required": ["city"],
            },
            "return": {"type": "string"},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "now",
            "description": "The time",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]
CALL = {
    "type": "function",
    "function": {
        "name": "weather",
        "arguments": {"city": "Köln", "days": 2, "exact": True, "near": None, "at": [1.5, 1e-7]},
    },
}
CONVERSATIONS: dict[str, Messages] = {
    "one turn": [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "It is 4."},
    ],
    "white space and marks": [
        {"role": "user", "content": '  <b>"Größe"</b> \n\n 日本 {{ x }} \t'},
        {"role": "assistant", "content": "\n 'Yes' & “no” \n"},
    ],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A model."},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Bye!"},
    ],
    "open": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ],
    "reasoning": [
        {"role": "user", "content": "Hard?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Let me\nthink."},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "<think>\nHm.\n</think>\n\nBecause."},
    ],
    "null values": [
        {"role": "user", "content": "Hi", "name": None},
        {"role": "assistant", "content": "Hello.", "tool_calls": None, "thinking": "Greet."},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ],
    "a call": [
        {"role": "user", "content": "Weather in Köln?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": '{"sky": "grey"}'},
        {"role": "assistant", "content": "It is grey."},
    ],
    "calls with text": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather and time?"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "weather", "content": "grey", "tool_call_id": "1"},
        {"role": "tool", "name": "now", "content": "noon", "tool_call_id": "2"},
        {"role": "assistant", "content": "Grey at noon."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "Welcome."},
    ],
    "no user": [{"role": "assistant", "content": "First!"}],
    "odd role": [{"role": "critic", "content": "Hm."}, {"role": "user", "content": "Hi"}],
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE; the chat formats' special tokens are tokens of their own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=list(TOKENS.values())
    )
    texts = [path.read_text(encoding="utf-8") for path in TEMPLATES[:8]]
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(
        [AddedToken(text) for text in ("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, **TOKENS)


@pytest.fixture(scope="module", params=TEMPLATES, ids=lambda path: path.stem)
def template(request: pytest.FixtureRequest) -> str:
    return request.param.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(
    tokenizer: PreTrainedTokenizerFast, template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    yield path
    tokenizer.chat_template = None


def _cases() -> Iterator[tuple[str, Messages, list[dict[str, Any]] | None]]:
    for name, messages in CONVERSATIONS.items():
        yield name, messages, None
        yield f"{name}, tools", messages, TOOLS


def _reference(tokenizer: PreTrainedTokenizerFast, *args: Any, **kwargs: Any) -> Any:
    """What transformers makes of it, or None where its template refuses."""
    try:
        return tokenizer.apply_chat_template(*args, **kwargs)
    except Exception:
        return None


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def test_rendered_as_transformers_does(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    native = _native._ChatTemplate(template, json.dumps(TOKENS))
    rendered = 0
    for name, messages, tools in _cases():
        for prompt in (False, True):
            for variables in ({}, {"enable_thinking": False}):
                expected = _reference(
                    tokenizer, messages, tools=tools, chat_template=template, tokenize=False,
                    add_generation_prompt=prompt, **variables,
                )  # fmt: skip
                call = (json.dumps(messages), _json(tools), prompt, json.dumps(variables))
                if expected is None:
                    with pytest.raises(ValueError, match="the chat template fails"):
                        native.render(*call)
                else:
                    assert native.render(*call) == expected, name
                    rendered += 1
    assert rendered >= 8


def test_masks_from_markers_are_transformers(
    tokenizer: PreTrainedTokenizerFast, template: str, folder: Path
) -> None:
    if "generation %}" not in template:
        pytest.skip("no markers")
    native = _native._ChatTokenizer(folder)
    compared = 0
    for name, messages, tools in _cases():
        if not any(message["role"] == "assistant" for message in messages):
            continue
        expected = _reference(
            tokenizer, messages, tools=tools, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        if expected is None:
            continue
        ids, trained = native.encode(json.dumps(messages), _json(tools))
        mask = [0] * len(ids)
        for start, end in trained:
            mask[start:end] = [1] * (end - start)
        assert ids == expected["input_ids"], name
        # A first token is never predicted: nothing comes before it.
        assert mask[1:] == expected["assistant_masks"][1:], name
        compared += sum(mask) > 0
    assert compared >= 2


def test_masks_by_prefix_are_trls(
    tokenizer: PreTrainedTokenizerFast, template: str, folder: Path
) -> None:
    """TRL trains what a prompt's completion adds to the prompt with its generation prompt."""
    if "generation %}" in template:
        pytest.skip("markers")
    native = _native._ChatTokenizer(folder)
    compared = 0
    for name, messages, tools in _cases():
        answers = [index for index, one in enumerate(messages) if one["role"] == "assistant"]
        if len(answers) != 1 or answers[0] != len(messages) - 1:
            continue
        prompt = _reference(
            tokenizer, messages[:-1], tools=tools, add_generation_prompt=True, tokenize=False
        )
        whole = _reference(tokenizer, messages, tools=tools, tokenize=False)
        if prompt is None or whole is None:
            continue
        if not whole.startswith(prompt):
            with pytest.raises(ValueError, match=r"renders turn \d otherwise once others follow"):
                native.encode(json.dumps(messages), _json(tools))
            compared += 1
            continue
        encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = len(before)
        if encoded["input_ids"][:start] != before:
            # A token reaches over the boundary: it holds text of the assistant's.
            ends = [end for _, end in encoded["offset_mapping"]]
            start = next(index for index, end in enumerate(ends) if end > len(prompt))
        ids, trained = native.encode(json.dumps(messages), _json(tools))
        assert ids == encoded["input_ids"], name
        assert trained == [(start, len(ids))], name
        compared += 1
    assert compared >= 1
