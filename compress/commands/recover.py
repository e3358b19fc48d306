"""`paredown recover`."""

from typing import Annotated

import typer

from paredown.commands.compress import print_report
from paredown.commands.early import check
from paredown.commands.options import (
    AllowTaskCode,
    Calibration,
    Device,
    EvalText,
    Json,
    LogTo,
    NoCache,
    Out,
    Quiet,
    RecipeName,
    Samples,
    Seed,
    Set,
    TaskFolder,
    Tasks,
    Verbose,
    listed,
    typed,
)


def recover(
    checkpoint: Annotated[
        str, typer.Argument(help="A compressed checkpoint, packed or dense with zeros or smaller.", metavar="OUT")
    ],
    teacher: Annotated[str, typer.Option("--teacher", help="The dense model that it was made of: a folder or hub id.")],
    recipe: RecipeName,
    out: Out,
    overrides: Set = [],  # noqa: B006 - typer reads the default
    calibration: Calibration = None,
    eval_text: EvalText = [],  # noqa: B006
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    allow_task_code: AllowTaskCode = False,
    samples: Samples = False,
    device: Device = "auto",
    seed: Seed = None,
    no_cache: NoCache = False,
    log_to: LogTo = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train what a compressed checkpoint stores towards its dense model, into a NEW one; masks stay as they are."""
    check(checkpoint, teacher, recipe=recipe, overrides=overrides, out=out, log_to=log_to)
    from paredown.commands.screen import screen
    from paredown.compress.run.recover import recover as run

    with screen(quiet=quiet, verbose=verbose) as shown:
        report = run(
            checkpoint, teacher, recipe, out, overrides=overrides, calibration=calibration, eval_text=eval_text,
            tasks=listed(tasks), task_folder=task_folder, allow_task_code=allow_task_code, samples=samples,
            cache=not no_cache, device=device, seed=seed, note=shown.note, doing=shown.doing, command=typed(),
            log_to=None if log_to is None else log_to.value,
        )  # fmt: skip
    print_report(report, json_output)
