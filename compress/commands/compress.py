"""`paredown compress` and `paredown demo`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Out,
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
    typed,
)

if TYPE_CHECKING:
    from paredown.evaluation.schema import Report


def compress(
    model: Model,
    recipe: RecipeName,
    out: Out,
    overrides: Set = [],  # noqa: B006 - typer reads the default
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
    format: Annotated[
        Format, typer.Option("--format", help="packed is smaller; dense loads everywhere.")
    ] = Format.packed,
    remote_code: RemoteCode = False,
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
    """Compress MODEL by a recipe into OUT, with figures before and after."""
    overrides = changed(overrides, eval_windows)
    check(model, recipe=recipe, overrides=overrides, out=out, push=push, log_to=log_to)
    from paredown.commands.screen import screen
    from paredown.compress.run.compress import compress as run

    with screen(quiet=quiet, verbose=verbose) as shown:
        report = run(
            model, recipe, out, overrides=overrides, plugins=plugins, calibration=calibration,
            eval_text=eval_text, tasks=listed(tasks), task_folder=task_folder, allow_task_code=allow_task_code,
            samples=samples, words=words, cache=not no_cache, format=format.value, remote_code=remote_code, device=device,
            dtype=dtype, seed=seed, seeds=seeds or (), allow_scored_calibration=allow_scored, revision=revision,
            progress=shown.block, note=shown.note, doing=shown.doing, command=typed(),
            log_to=None if log_to is None else log_to.value,
        )  # fmt: skip
    print_report(report, json_output)
    uploaded(out, push, private)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("out/demo"),
    eval_windows: EvalWindows = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prune the bundled model to 2:4 by SparseGPT, score it on the bundled text and task, and write the checkpoint."""
    check(out=out)
    from paredown.commands.screen import screen
    from paredown.compress.run.compress import compress as run
    from paredown.evaluation.reference import model_path

    with screen(quiet=quiet, verbose=verbose) as shown:
        report = run(
            str(model_path()), "sparsegpt-2of4", out, overrides=changed([], eval_windows), tasks=("stdlib_lines",),
            progress=shown.block, note=shown.note, doing=shown.doing, command=typed(),
        )  # fmt: skip
    print_report(report, json_output)


def print_report(report: "Report", json_output: bool) -> None:
    """The report on standard output, as tables or as JSON."""
    from paredown.evaluation.report import render
    from paredown.evaluation.terminal import out_console

    print(json.dumps(report, indent=2)) if json_output else out_console.print(render(report))


def uploaded(out: Path, repository: str | None, private: bool) -> None:
    """Upload OUT if a repository is named."""
    if repository is not None:
        from paredown.compress.run.push import push
        from paredown.evaluation.terminal import show_note

        show_note(f"uploading {out}")
        show_note(push(out, repository, private))
