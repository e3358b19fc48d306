"""`paredown plan`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.early import check
from paredown.commands.options import (
    AllowScored,
    AllowTaskCode,
    Calibration,
    Device,
    Dtype,
    EvalText,
    EvalWindows,
    Format,
    Json,
    LogTo,
    Model,
    NoCache,
    Plugin,
    Private,
    Push,
    Quiet,
    RecipeName,
    RemoteCode,
    Revision,
    Samples,
    Seed,
    Seeds,
    Set,
    TaskFolder,
    Tasks,
    Verbose,
    Words,
    changed,
    listed,
    running,
)


def plan(
    model: Model,
    recipe: RecipeName,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Where compress would write: its disk is looked at.")
    ] = None,
    overrides: Set = [],  # noqa: B006
    plugins: Plugin = [],  # noqa: B006
    calibration: Calibration = None,
    eval_text: EvalText = [],  # noqa: B006
    eval_windows: EvalWindows = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    allow_task_code: AllowTaskCode = False,
    samples: Samples = False,
    words: Words = False,
    no_cache: NoCache = False,
    format: Annotated[Format, typer.Option("--format")] = Format.packed,
    remote_code: RemoteCode = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe/--no-probe", help="Time the first block, and say how long the run takes. Reads the text."
        ),
    ] = True,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Measure, too, what several shares would lose on the calibration text."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    seeds: Seeds = None,
    allow_scored: AllowScored = False,
    revision: Revision = None,
    push: Push = None,
    private: Private = False,
    log_to: LogTo = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what would happen: layers, parameters, bytes, memory, disk and time. Takes the options of compress."""
    overrides = changed(overrides, eval_windows)
    check(model, recipe=recipe, overrides=overrides, out=out, push=push, log_to=log_to)
    from paredown.commands.display import show_curve, show_plan
    from paredown.commands.screen import screen
    from paredown.compress.checkpoint.remote_code import check_packed
    from paredown.compress.run.curve import loss_curve
    from paredown.compress.run.open import resolve_recipe
    from paredown.compress.run.plan import plan as run
    from paredown.compress.run.seeds import seeds_of

    startup = running()
    if remote_code:
        check_packed(format.value)
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, listed(tasks), seed, plugins, allow_scored)
    runs = len(seeds_of(seeds, resolved.calibration.seed)) if seeds else 1
    with screen(quiet=quiet, verbose=verbose) as shown:
        result = run(
            model, resolved, task_folder=task_folder, allow_task_code=allow_task_code, format=format.value,
            device=device, dtype=dtype, revision=revision, out=out, probe=probe, startup=startup, runs=runs,
            cache=not no_cache, note=shown.note,
        )  # fmt: skip
    if not json_output:
        show_plan(result)
    plain = result.to_dict()
    if curve:
        with screen(quiet=quiet, verbose=verbose) as shown:
            found = loss_curve(
                model, resolved, device=device, dtype=dtype, revision=revision, cache=not no_cache, note=shown.note,
                doing=shown.doing,
            )  # fmt: skip
        plain["curve"] = found.to_dict()
        if not json_output:
            show_curve(found)
    if json_output:
        print(json.dumps(plain, indent=2))
