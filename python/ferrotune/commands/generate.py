"""`ferrotune generate`."""

from collections.abc import Callable, Sequence
from typing import Annotated

from ..options import Option, collect
from ..registry import Invocation, command
from ..results import GenerateResult
from ..shared import Adapter, Blocksize, DoubleQuant, LoadedQuantType, Model, Threads

SAMPLING = "sampling"


def _call(invocation: Invocation) -> GenerateResult | None:
    """Writes the text to stdout as it comes, behind the prompt."""
    import sys

    if invocation.as_json:
        return generate(**invocation.values)
    pending = [invocation.values["prompt"]]

    def write(text: str) -> None:
        """The prompt waits for the first text: settings and model are good then."""
        sys.stdout.write("".join([*pending, text]))
        sys.stdout.flush()
        pending.clear()

    result = generate(**invocation.values, on_text=write)
    write("\n")
    for warning in result.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    speed = f"{result.tokens_per_second:.0f} tokens/s"
    print(f"{result.tokens} tokens in {result.seconds:.1f} s, {speed}", file=sys.stderr)
    return None


@command(
    "generate",
    examples=(
        'ferrotune generate --model llama/ --prompt "In the beginning"',
        'ferrotune generate --model llama/ --adapter my-run/adapter --prompt "And" --temperature 0',
    ),
    run=_call,
)
def generate(
    model: Model,
    prompt: Annotated[str, Option("text to continue", group=SAMPLING)],
    adapter: Adapter = None,
    *,
    quant_type: LoadedQuantType = None,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    max_tokens: Annotated[
        int, Option("most tokens to generate", unit="tokens", group=SAMPLING)
    ] = 100,
    temperature: Annotated[
        float, Option("of the softmax; 0 always takes the likeliest token", group=SAMPLING)
    ] = 0.8,
    top_k: Annotated[
        int | None, Option("sample from this many likeliest tokens", group=SAMPLING, unset="all")
    ] = None,
    top_p: Annotated[
        float | None,
        Option(
            "sample from the likeliest tokens that hold this share", group=SAMPLING, unset="all"
        ),
    ] = None,
    seed: Annotated[int, Option("of the sampling", group=SAMPLING)] = 0,
    stop: Annotated[
        Sequence[str], Option("texts that end the generation, and are left out", group=SAMPLING)
    ] = (),
    threads: Threads = None,
    on_text: Callable[[str], bool | None] | None = None,
) -> GenerateResult:
    """Continue a prompt with a model and, if given, an adapter.

    Args:
        on_text: called with each piece of text as it is generated; returning False ends the
            generation.

    Returns:
        A GenerateResult: the text without the prompt, tokens and seconds.

    Raises:
        SettingError, ValueError, FormatError, OSError, NotImplementedError: as in
        `ferrotune.train`.
    """
    arguments = locals()
    import json

    from .. import _native

    settings = collect(generate, arguments)
    relay = None if on_text is None else lambda text: on_text(text) is not False
    found = json.loads(_native.generate(json.dumps(settings), relay))
    names = ("text", "tokens", "seconds", "tokens_per_second")
    values = {name: found[name] for name in names}
    return GenerateResult(settings["prompt"], **values, warnings=tuple(found["warnings"]))
