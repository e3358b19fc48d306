"""`paredown eval`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.early import check
from paredown.commands.options import (
    AllowTaskCode,
    Bos,
    Device,
    Dtype,
    EvalText,
    Json,
    Model,
    NoCache,
    Quiet,
    Revision,
    Samples,
    TaskFolder,
    Tasks,
    Verbose,
    Words,
    listed,
)


def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option("--against", help="The dense model to compare with.")] = None,
    eval_text: EvalText = [],  # noqa: B006
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    allow_task_code: AllowTaskCode = False,
    samples: Samples = False,
    words: Words = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="Folder for `evaluation/`: the result and each task's, from which it goes on."
        ),
    ] = None,
    no_cache: NoCache = False,
    length: Annotated[int, typer.Option("--length", help="Window in tokens; capped by what the model allows.")] = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="Read no more windows than this.")] = None,
    bos: Annotated[Bos, typer.Option("--bos", help="A BOS before every window, if the tokenizer adds one.")] = Bos.auto,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Score a model, dense or packed, block by block; beside its dense original with --against."""
    check(model, against)
    from paredown.commands.screen import screen
    from paredown.compress.run.evaluate import evaluate as run
    from paredown.evaluation.report import render_eval
    from paredown.evaluation.terminal import out_console

    with screen("scoring", quiet, verbose) as shown:
        result = run(
            model, against, eval_text=eval_text or ["stdlib"], tasks=listed(tasks) or (), task_folder=task_folder,
            allow_task_code=allow_task_code, samples=samples, words=words, out=out, cache=not no_cache, length=length,
            windows=windows, bos=bos.value, device=device, dtype=dtype, revision=revision, progress=shown.bar,
            note=shown.note,
        )  # fmt: skip
    print(json.dumps(result, indent=2)) if json_output else out_console.print(render_eval(result))
