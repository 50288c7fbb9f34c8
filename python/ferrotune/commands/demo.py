"""`ferrotune demo`: the main job on the model and the text that come with the package."""

from pathlib import Path
from typing import Annotated, Any

from ..kinds import StrPath
from ..options import Option, collect
from ..registry import command
from ..results import DemoResult, Sample
from ..shared import RUN, Progress, Threads

DEFAULT_OUTPUT = "ferrotune-demo"
PROMPTS = ("And the king said unto", "In the beginning")
SAMPLE_TOKENS = 60

# The model is small and its adapters start from text of another kind: a rate far above the usual.
TRAINING: dict[str, Any] = {
    "method": "qlora",
    "text_column": "text",
    "group": "book",
    "near_duplicates": 0.0,  # the Gospels and the Chronicles would bind the books together
    "learning_rate": 5e-3,
    "eval_tokens": 16_384,  # of the Bible, and of the model's own domain
}


@command("demo", examples=("ferrotune demo", "ferrotune demo --output my-demo --steps 100"))
def demo(
    output: Annotated[
        StrPath | None,
        Option(
            "folder of the run; must be new or empty",
            group=RUN,
            unset=f"{DEFAULT_OUTPUT}, numbered if taken",
        ),
    ] = None,
    *,
    steps: Annotated[
        int, Option("training steps of 2,048 tokens; the same numbers on every machine", group=RUN)
    ] = 350,
    seconds: Annotated[
        float, Option("most time for training, on slow machines", unit="seconds", group=RUN)
    ] = 90.0,
    seed: Annotated[int, Option("of the training and of the samples", group=RUN)] = 0,
    threads: Threads = None,
    progress: Progress = True,
) -> DemoResult:
    """Fine-tune the model that comes with the package on real text with QLoRA, in two minutes.

    Quantises a small pre-trained Llama model to NF4 with double quantisation, trains LoRA
    adapters on every linear layer with the King James Bible, split by book, and compares loss
    and generated text before and after, and what the model forgot of its own domain. Uses no
    network and no PyTorch.

    Returns:
        A DemoResult: the training's result with the loss on text like the model's pre-training
        text, samples of text, and the seconds of everything.

    Raises:
        FileNotFoundError: the package was built without the demo's data.
        Otherwise as `ferrotune.train`.
    """
    arguments = locals()
    import time

    from .. import files
    from .generate import generate
    from .train import train

    started = time.perf_counter()
    settings = collect(demo, arguments)
    model, text = locate("demo-model"), locate("kjv.parquet")
    own_text = locate("docs-heldout.parquet")
    folder = settings["output"]
    if folder is None:
        folder = files.free_sibling(Path(DEFAULT_OUTPUT))

    def continue_prompts(adapter: Path | None) -> list[str]:
        return [
            generate(
                model,
                prompt,
                adapter,
                quant_type="nf4",
                max_tokens=SAMPLE_TOKENS,
                seed=settings["seed"],
                threads=settings["threads"],
            ).text
            for prompt in PROMPTS
        ]

    before = continue_prompts(None)
    trained = train(
        model,
        text,
        folder,
        **TRAINING,
        engine="embedded",
        forgetting=own_text,
        max_steps=settings["steps"],
        max_seconds=settings["seconds"],
        seed=settings["seed"],
        threads=settings["threads"],
        progress=settings["progress"],
    )
    after = continue_prompts(trained.adapter)
    samples = tuple(map(Sample, PROMPTS, before, after))
    return DemoResult(trained, samples, time.perf_counter() - started)


def locate(name: str) -> Path:
    """A file or folder of the package's data. Raises FileNotFoundError."""
    import errno
    import os
    from importlib.resources import files

    path = Path(str(files("ferrotune"))) / "data" / name
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    return path
