"""`paredown compare`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.options import Json
from paredown.compress.errors import PareError


class Cost(StrEnum):
    bytes = "bytes"
    parameters = "parameters"
    latency = "latency"


class Loss(StrEnum):
    perplexity = "perplexity"
    kl = "kl"


def compare(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders that compress wrote, with report.json.", metavar="OUT...")
    ],
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with a picture to this file.")] = None,
    cost: Annotated[
        Cost, typer.Option("--cost", help="Across the picture; latency is read from OUT/bench.json (bench OUT -o OUT).")
    ] = Cost.bytes,
    loss: Annotated[
        Loss, typer.Option("--loss", help="Up the picture: rise of log perplexity, or KL from the dense model.")
    ] = Loss.perplexity,
    json_output: Json = False,
) -> None:
    """Show finished runs side by side; those of different models or texts in groups of their own."""
    from paredown.evaluation.compare import compare as run
    from paredown.evaluation.compare import parse_axes
    from paredown.evaluation.compare_tables import render_comparison
    from paredown.evaluation.html.comparison import comparison_page
    from paredown.evaluation.terminal import out_console, show_note

    if html is not None and (html.is_dir() or not html.parent.is_dir()):
        raise PareError(f"--html {html}: wanted a file in a folder that is there.")
    groups = run(folders)
    axes = parse_axes(cost.value, loss.value, groups)
    if html is not None:
        html.write_text(comparison_page(groups, *axes), encoding="utf-8", newline="\n")
        show_note(f"wrote {html}")
    plain = json.dumps([group.to_dict() for group in groups], indent=2)
    print(plain) if json_output else out_console.print(render_comparison(groups))
