"""What is done with a checkpoint that is there: `paredown export` and `paredown verify`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from paredown.commands.compress import uploaded
from paredown.commands.early import check
from paredown.commands.options import ExportFormat, Json, Out, Private, Push, Quiet, RemoteCode, Verbose


def export(
    folder: Annotated[
        str,
        typer.Argument(
            help="A packed checkpoint, a dense one with zeros in it, or one in compressed-tensors' removed formats "
            "sparse-24-bitmask and sparse-bitmask.",
            metavar="OLD",
        ),
    ],
    out: Out,
    format: Annotated[
        ExportFormat | None,
        typer.Option(
            "--format",
            help="packed is smaller; dense loads everywhere; deci is a Llama with blocks of their own sizes, for vLLM; "
            "gguf is one file for llama.cpp, onnx a graph for onnxruntime. Without it a packed OLD becomes dense, any "
            "other packed.",
        ),
    ] = None,
    remote_code: RemoteCode = False,
    push: Push = None,
    private: Private = False,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint between packed and dense, without the original model."""
    check(folder, out=out, push=push)
    from paredown.commands.screen import screen
    from paredown.compress.run.export import export as run
    from paredown.evaluation.terminal import out_console

    with screen("exporting", quiet, verbose) as shown:
        result = run(folder, out, format.value if format else None, shown.bar, remote_code)
    sizes = result["bytes"]
    summary = f"{out}: {result['format']}, {sizes['before'] / 1e6:.1f} MB -> {sizes['after'] / 1e6:.1f} MB of weights"
    print(json.dumps(result, indent=2)) if json_output else out_console.print(summary)
    uploaded(out, push, private)


def verify(
    folder: Annotated[Path, typer.Argument(help="A checkpoint that paredown wrote.", metavar="DIR")],
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check names, shapes, hashes, masks, sparsity, tokens, and losses by from_pretrained. Exits with 1 on any fault."""
    from paredown.commands.screen import screen
    from paredown.compress.run.verify import verify as run

    remarks: list[str] = []
    with screen("reading tensors", quiet, verbose) as shown:
        faults = run(folder, remarks.append, shown.bar)
    for remark in remarks:
        print(remark)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise typer.Exit(1)
    print(f"{folder}: sound")
