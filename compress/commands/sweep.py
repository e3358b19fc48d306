"""`paredown sweep`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

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
    Quiet,
    RemoteCode,
    Revision,
    Samples,
    Seed,
    Seeds,
    TaskFolder,
    Tasks,
    Verbose,
    Words,
    changed,
    listed,
)


class Keep(StrEnum):
    reports = "reports"
    checkpoints = "checkpoints"


def sweep(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder with one folder for each run; go on there, too.")],
    recipes: Annotated[str | None, typer.Option("--recipe", "-r", help="Recipes, separated by commas.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Change a key: key=value, or key=a,b,c to try each. Repeatable.")
    ] = [],  # noqa: B006 - typer reads the default
    runs: Annotated[Path | None, typer.Option("--runs", help="A YAML list of runs instead of a grid.")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="So many runs at a time: 1, or with --ray one a machine.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option("--ray", help="Run on this Ray cluster: host:port, auto, or local.", metavar="ADDRESS"),
    ] = None,
    keep: Annotated[
        Keep, typer.Option("--keep", help="What stays of a run: its report alone, or the checkpoint too.")
    ] = Keep.reports,
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
    log_to: LogTo = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Compress MODEL by many recipes and settings, and compare what came of it. The same command goes on after a stop."""
    check(model, log_to=log_to)
    if (runs is None) == (recipes is None):
        raise typer.BadParameter("name either recipes, as in -r wanda-50,sparsegpt-50, or a file of --runs.")
    from paredown.commands.screen import screen
    from paredown.compress.run.sweep import sweep as run
    from paredown.compress.run.trials import grid, read_trials

    changes = changed(overrides, eval_windows)
    trials = grid(listed(recipes) or (), changes) if runs is None else read_trials(runs, changes)
    settings = {
        "plugins": [str(path) for path in plugins], "calibration": calibration, "eval_text": eval_text,
        "tasks": listed(tasks), "task_folder": None if task_folder is None else str(task_folder),
        "format": format.value, "device": device, "dtype": dtype, "seed": seed, "seeds": seeds or (),
        "allow_scored_calibration": allow_scored, "revision": revision, "allow_task_code": allow_task_code,
        "samples": samples, "words": words, "cache": not no_cache, "remote_code": remote_code,
        "log_to": None if log_to is None else log_to.value,
    }  # fmt: skip
    with screen("sweep", quiet=quiet, verbose=verbose) as shown:
        outcome = run(
            model, trials, out, settings, workers=workers, ray=ray, keep=keep.value, note=shown.note, doing=shown.doing
        )
    _show(outcome, out, json_output)
    if outcome.failed:
        raise typer.Exit(1)


def _show(outcome: Any, out: Path, json_output: bool) -> None:
    """What is done side by side, on the screen and as a page; what failed, with its message."""
    from paredown.evaluation.compare import compare
    from paredown.evaluation.compare_tables import render_comparison
    from paredown.evaluation.html.comparison import comparison_page
    from paredown.evaluation.terminal import err_console, out_console

    groups = compare(outcome.folders) if len(outcome.folders) > 1 else []  # one has nothing to be compared with
    if groups:
        (out / "compare.html").write_text(comparison_page(groups), encoding="utf-8", newline="\n")
    plain = {"groups": [group.to_dict() for group in groups], "failed": outcome.failed}
    if json_output:
        print(json.dumps(plain, indent=2))
    elif groups:
        out_console.print(render_comparison(groups))
    for name, message in outcome.failed.items():
        err_console.print(f"{name} failed: {message}", markup=False, highlight=False)
    if not json_output:
        told = (
            f"{out / 'compare.html'}: the same with its picture"
            if groups
            else f"{len(outcome.folders)} of the runs done"
        )
        out_console.print(told, style="dim", markup=False)
