"""`paredown recover`."""

from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.compress import print_report
from paredown.commands.early import check
from paredown.commands.options import (
    Calibration,
    Device,
    EvalText,
    Json,
    Out,
    Quiet,
    RecipeName,
    Seed,
    Set,
    Verbose,
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
    device: Device = "auto",
    seed: Seed = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train what a compressed checkpoint stores towards its dense model, into a NEW one; masks stay as they are."""
    check(checkpoint, teacher, recipe=recipe, overrides=overrides, out=out)
    from paredown.commands.screen import screen
    from paredown.compress.progress import Progress
    from paredown.compress.run.once import How
    from paredown.compress.run.open import resolve_recipe
    from paredown.compress.run.recover import recover as run

    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, seed=seed)
    with screen(quiet=quiet, verbose=verbose) as shown:
        progress = Progress(note=shown.note, doing=shown.doing)
        how = How(device=device, progress=progress, command=typed())
        report = run(checkpoint, resolved, Path(out), teacher, how)
    print_report(report, json_output)
