"""`paredown merge`."""

from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.compress import print_report
from paredown.commands.early import check
from paredown.commands.options import Device, Json, Out, Quiet, Verbose, typed


def merge(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint, packed or dense.", metavar="OUT")],
    adapter: Annotated[
        Path, typer.Option("--adapter", help="A LoRA adapter: the folder that peft's save_pretrained wrote.")
    ],
    out: Out,
    device: Device = "auto",
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Merge a LoRA adapter into a checkpoint, into a NEW one of the same form: masks, 2:4 and ranks stay as they are."""
    check(checkpoint, out=out)
    from paredown.compress.serving.adapter_config import read_config

    read_config(adapter)
    from paredown.commands.screen import screen
    from paredown.compress.run.merge import merge as run

    with screen(quiet=quiet, verbose=verbose) as shown:
        report = run(checkpoint, adapter, out, device=device, note=shown.note, doing=shown.doing, command=typed())
    print_report(report, json_output)
