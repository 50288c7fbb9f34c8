"""Settings that several functions have in common."""

from typing import Annotated, Literal

from .kinds import StrPath, StrPaths
from .options import Option

DATA = "data"
MODEL = "model"
TRAINING = "training"
HELDOUT = "held-out evaluation"
RUN = "run"

Model = Annotated[
    StrPath,
    Option(
        "folder of a Hugging Face Llama model: config.json, safetensors, tokenizer.json",
        group=MODEL,
    ),
]
Data = Annotated[
    StrPaths,
    Option(
        "text: .txt, .jsonl, .csv or .parquet files, or folders of them",
        unit="one or more",
        group=DATA,
    ),
]
Adapter = Annotated[
    StrPath | None, Option("folder of a PEFT LoRA adapter for the model", group=MODEL)
]
LoadedQuantType = Annotated[
    Literal["nf4", "fp4"] | None,
    Option("hold the linear layers in 4 bits", group=MODEL, unset="as stored"),
]
Blocksize = Annotated[
    int,
    Option("values that share one absmax, a power of two", unit="32 to 4096", group=MODEL),
]
DoubleQuant = Annotated[
    bool, Option("quantise the absmax values too, to 8 bits in blocks of 256", group=MODEL)
]
SequenceLength = Annotated[
    int, Option("longest sequence, and length of a packed row", unit="tokens", group=DATA)
]
TextColumn = Annotated[
    str | None,
    Option("column that holds the text", group=DATA, unset="text, or prompt and completion"),
]
PromptColumn = Annotated[
    str | None,
    Option("column of the prompts, which carry no loss", group=DATA, unset="prompt"),
]
CompletionColumn = Annotated[
    str | None, Option("column of the completions", group=DATA, unset="completion")
]
BatchSize = Annotated[int, Option("rows computed at once", unit="sequences", group=DATA)]
Threads = Annotated[int | None, Option("CPU threads", group=RUN, unset="all cores")]
Progress = Annotated[
    bool, Option("show progress: on stderr, or as a live curve in Jupyter", group=RUN)
]
