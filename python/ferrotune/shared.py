"""Settings that several functions have in common."""

from typing import Annotated, Literal

from .kinds import DataSources, StrPath
from .options import Option

DATA = "data"
MODEL = "model"
TRAINING = "training"
HELDOUT = "held-out evaluation"
RUN = "run"

Model = Annotated[
    StrPath,
    Option(
        "folder of a Hugging Face model (Llama, GPT-2 or BERT): config.json, safetensors, "
        "tokenizer.json",
        group=MODEL,
    ),
]
Data = Annotated[
    DataSources,
    Option(
        "files or folders: .txt, .jsonl, .csv, .tsv, .parquet, .arrow, also .gz and .zst; in "
        "Python also a Dataset, a pandas or polars frame",
        unit="one or more",
        group=DATA,
    ),
]
Adapter = Annotated[StrPath | None, Option("folder of an adapter for the model", group=MODEL)]
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
    Option(
        "column that holds the text",
        group=DATA,
        unset="text, or messages, or prompt and completion",
    ),
]
PromptColumn = Annotated[
    str | None,
    Option("column of the prompts, which carry no loss", group=DATA, unset="prompt"),
]
CompletionColumn = Annotated[
    str | None, Option("column of the completions", group=DATA, unset="completion")
]
MessagesColumn = Annotated[
    str | None,
    Option(
        "column of conversations, of which the assistant's turns carry loss; the model folder's "
        "chat template renders them",
        group=DATA,
        unset="messages",
    ),
]
LabelColumn = Annotated[
    str | None,
    Option("column of the class of each text", group=DATA, unset="label, where there is one"),
]
Group = Annotated[
    str | None,
    Option("column whose equal values stay on one side of the split", group=HELDOUT),
]
Stratify = Annotated[
    bool, Option("give each side its part of every label, where there are labels", group=HELDOUT)
]
NearDuplicates = Annotated[
    float,
    Option(
        "similarity from which texts stay on one side, by their character 5-grams (Jaccard); 0 "
        "for exact duplicates alone",
        unit="0 to 1",
        group=HELDOUT,
    ),
]
BatchSize = Annotated[int, Option("rows computed at once", unit="sequences", group=DATA)]
Threads = Annotated[int | None, Option("CPU threads", group=RUN, unset="all cores")]
Progress = Annotated[
    bool, Option("show progress: on stderr, or as a live curve in Jupyter", group=RUN)
]
