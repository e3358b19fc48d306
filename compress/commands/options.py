"""Arguments and options that several commands share, and how a list on the command line is read."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from time import time
from typing import Annotated

import typer


class Format(StrEnum):
    packed = "packed"
    dense = "dense"


class ExportFormat(StrEnum):
    packed = "packed"
    dense = "dense"
    deci = "deci"
    gguf = "gguf"
    onnx = "onnx"


class Bos(StrEnum):
    auto = "auto"
    none = "none"


Model = Annotated[str, typer.Argument(help="A local folder, or a hub id like org/name.", metavar="MODEL")]


def _shipped(incomplete: str) -> list[str]:
    from paredown.compress.recipe import shipped_names

    return [name for name in shipped_names() if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Option(
        "--recipe",
        "-r",
        help="A shipped recipe (see: paredown recipes), or a YAML file.",
        autocompletion=_shipped,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")]
Set = Annotated[list[str], typer.Option("--set", help="Change a key of the recipe: key=value, repeatable.")]
Plugin = Annotated[
    list[Path],
    typer.Option("--plugin", help="A Python file that registers methods of your own; it is run. Repeatable."),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Calibrate on this text instead of the recipe's.")
]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Score on this text; repeatable.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas; bias: three of them.")]
TaskFolder = Annotated[
    Path | None,
    typer.Option("--task-folder", help="Further lm-eval task YAML."),
]
AllowTaskCode = Annotated[
    bool,
    typer.Option("--allow-task-code", help="Run the Python that YAML in the task folder names: only what you trust."),
]
Samples = Annotated[bool, typer.Option("--samples", help="How the models go on after five prompts.")]
NoCache = Annotated[
    bool, typer.Option("--no-cache", help="Measure the dense model anew, and keep nothing of it in ~/.cache/paredown.")
]


class Board(StrEnum):
    trackio = "trackio"
    wandb = "wandb"
    tensorboard = "tensorboard"


LogTo = Annotated[
    Board | None,
    typer.Option("--log-to", help="Send all numbers there too, if it is installed; OUT/log.jsonl always has them."),
]
Words = Annotated[
    bool, typer.Option("--word-perplexity", help="Word perplexity too, of texts that have documents, as lm-eval.")
]
RemoteCode = Annotated[
    bool,
    typer.Option(
        "--remote-code",
        help="Beside packed weights a file by which trust_remote_code=True loads them where paredown is installed, as in "
        "lm_eval --model hf.",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Commit, branch or tag of a hub model.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the calibration windows.")]
Seeds = Annotated[
    str | None,
    typer.Option(
        "--seeds", help="Several seeds, 3 or 0,1,2: the report has each one's figures, the checkpoint is the first's."
    ),
]
AllowScored = Annotated[
    bool,
    typer.Option("--allow-scored-calibration", help="Calibrate on text that is scored too; the report warns of it."),
]
EvalWindows = Annotated[
    int | None,
    typer.Option("--eval-windows", min=1, help="Score no more windows of a text than this: faster, and coarser."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors and the result, and nothing else.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show every step, with the time.")]
Push = Annotated[
    str | None,
    typer.Option("--push", help="Upload OUT to the Hugging Face Hub under this name.", metavar="ORG/NAME"),
]
Private = Annotated[bool, typer.Option("--private", help="With --push: a new repository is private.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else there.")
]


def listed(words: str | None) -> tuple[str, ...] | None:
    """Names that are separated by commas; None for an option that was not given."""
    return None if words is None else tuple(name.strip() for name in words.split(",") if name.strip())


def changed(overrides: list[str], eval_windows: int | None) -> list[str]:
    """The changes of a recipe, of those that have an option of their own too."""
    return [*overrides, *([] if eval_windows is None else [f"evaluate.windows={eval_windows}"])]


def running() -> float:
    """Seconds since this process was started."""
    import psutil  # type: ignore[import-untyped]

    return time() - float(psutil.Process().create_time())


def typed() -> str:
    """The command as a person typed it."""
    return shlex.join(["paredown", *sys.argv[1:]])
