"""What is measured of a checkpoint on this machine: `paredown bench` and `paredown tune`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.early import check
from paredown.commands.options import Device, Dtype, Json, Quiet, Revision, Verbose


def bench(
    model: Annotated[str, typer.Argument(help="A checkpoint, packed or dense: a folder or a hub id.", metavar="DIR")],
    against: Annotated[str | None, typer.Option("--against", help="The dense model to time in turn with it.")] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")] = "1,8,32",
    context: Annotated[
        int, typer.Option("--context", help="Tokens of prefill; capped by what the model allows.")
    ] = 512,
    decode: Annotated[int, typer.Option("--decode", help="Tokens to decode one by one.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", help="How often each is timed; median and range are shown.")] = 5,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for bench.json, bench.md and bench.svg.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure how fast a checkpoint runs, end to end and per layer; beside its dense original with --against."""
    check(model, against)
    from paredown.commands.screen import screen
    from paredown.compress.run.bench import bench as run
    from paredown.compress.run.bench import parse_batches
    from paredown.evaluation.speed import Settings
    from paredown.evaluation.speed_report import render_bench
    from paredown.evaluation.terminal import out_console

    settings = Settings(parse_batches(batch), context, decode, repeats)
    with screen("measuring", quiet, verbose) as shown:
        result = run(
            model, against, settings=settings, out=out, device=device, dtype=dtype, revision=revision,
            progress=shown.bar, note=shown.note,
        )  # fmt: skip
    print(json.dumps(result, indent=2)) if json_output else out_console.print(render_bench(result))


def tune(
    folders: Annotated[list[Path], typer.Argument(help="Packed checkpoints whose products to time.", metavar="DIR...")],
    device: Device = "auto",
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Time every kernel on this GPU for the sizes of these checkpoints, and keep the table that products are chosen by."""
    from paredown.commands.screen import screen
    from paredown.compress.run.tune import tune as run
    from paredown.evaluation.terminal import out_console

    with screen("tuning", quiet, verbose) as shown:
        table, file = run(folders, device, shown.bar)
    summary = f"{file}: {len(table.choices)} choices for {table.device}"
    print(table.to_json()) if json_output else out_console.print(summary)
