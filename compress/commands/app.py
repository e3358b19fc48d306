"""The command line: only argument parsing. Everything heavy is imported by the command that needs it."""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paredown.evaluation.schema import Report

app = typer.Typer(
    help="Post-training compression of language models: prune, score before and after, write a smaller checkpoint.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    packed = "packed"
    dense = "dense"


class ExportFormat(StrEnum):
    packed = "packed"
    dense = "dense"
    deci = "deci"


class Bos(StrEnum):
    auto = "auto"
    none = "none"


Model = Annotated[str, typer.Argument(help="A local folder, or a hub id like org/name.", metavar="MODEL")]
RecipeName = Annotated[
    str, typer.Option("--recipe", "-r", help="A shipped recipe (see: paredown recipes), or a YAML file.")
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be new or empty.")]
Set = Annotated[list[str], typer.Option("--set", help="Change a key of the recipe: key=value, repeatable.")]
Plugin = Annotated[
    list[Path],
    typer.Option("--plugin", help="A Python file that registers methods of your own; it is run. Repeatable."),
]
Calibration = Annotated[
    str | None, typer.Option("--calibration", help="Calibrate on this text instead of the recipe's.")
]
EvalText = Annotated[list[str], typer.Option("--eval-text", help="Score on this text; repeatable.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="lm-eval tasks, separated by commas.")]
TaskFolder = Annotated[
    Path | None,
    typer.Option("--task-folder", help="Further lm-eval task YAML. It may run Python: name only what you trust."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:1.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), bfloat16, float16 or float32.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Commit, branch or tag of a hub model.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of the calibration windows.")]
Json = Annotated[
    bool, typer.Option("--json", help="Print the report as JSON on standard output, and nothing else there.")
]


@app.command()
def compress(
    model: Model,
    recipe: RecipeName,
    out: Out,
    overrides: Set = [],  # noqa: B006 - typer reads the default
    plugins: Plugin = [],  # noqa: B006
    calibration: Calibration = None,
    eval_text: EvalText = [],  # noqa: B006
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    format: Annotated[
        Format, typer.Option("--format", help="packed is smaller; dense loads everywhere.")
    ] = Format.packed,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: Seed = None,
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Compress MODEL by a recipe into OUT, with figures before and after."""
    from paredown.commands.display import now_line, show_block
    from paredown.compress.run.compress import compress as run
    from paredown.evaluation.terminal import show_note

    with now_line() as doing:
        report = run(
            model, recipe, out, overrides=overrides, plugins=plugins, calibration=calibration,
            eval_text=eval_text, tasks=_names(tasks),
            task_folder=task_folder, format=format.value, device=device, dtype=dtype, seed=seed, revision=revision,
            progress=show_block, note=show_note, doing=doing, command="paredown " + _shell(sys.argv[1:]),
        )  # fmt: skip
    _print_report(report, json_output)


@app.command()
def plan(
    model: Model,
    recipe: RecipeName,
    overrides: Set = [],  # noqa: B006
    plugins: Plugin = [],  # noqa: B006
    format: Annotated[Format, typer.Option("--format")] = Format.packed,
    curve: Annotated[
        bool,
        typer.Option("--curve", help="Measure, too, what several shares would lose on the calibration text."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Say what would happen: layers, parameters, bytes, memory and disk. No weight is read, but for --curve."""
    from paredown.commands.display import now_line, show_curve, show_plan
    from paredown.compress.run.curve import loss_curve
    from paredown.compress.run.plan import plan as run
    from paredown.evaluation.terminal import show_note

    result = run(
        model, recipe, overrides=overrides, plugins=plugins, format=format.value, device=device, dtype=dtype,
        revision=revision,
    )  # fmt: skip
    if not json_output:
        show_plan(result)
    plain = result.to_dict()
    if curve:
        with now_line() as doing:
            found = loss_curve(
                model, recipe, overrides=overrides, plugins=plugins, device=device, dtype=dtype, revision=revision,
                note=show_note, doing=doing,
            )  # fmt: skip
        plain["curve"] = found.to_dict()
        if not json_output:
            show_curve(found)
    if json_output:
        print(json.dumps(plain, indent=2))


@app.command("eval")
def evaluate(
    model: Model,
    against: Annotated[str | None, typer.Option("--against", help="The dense model to compare with.")] = None,
    eval_text: EvalText = [],  # noqa: B006
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    length: Annotated[int, typer.Option("--length", help="Window in tokens; capped by what the model allows.")] = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="Read no more windows than this.")] = None,
    bos: Annotated[Bos, typer.Option("--bos", help="A BOS before every window, if the tokenizer adds one.")] = Bos.auto,
    device: Device = "auto",
    dtype: Dtype = "auto",
    revision: Revision = None,
    json_output: Json = False,
) -> None:
    """Score a model, dense or packed, block by block; beside its dense original with --against."""
    from paredown.compress.run.evaluate import evaluate as run
    from paredown.evaluation.report import render_eval
    from paredown.evaluation.terminal import out_console, show_note, step_bar

    with step_bar("scoring") as bar:
        result = run(
            model, against, eval_text=eval_text or ["stdlib"], tasks=_names(tasks) or (), task_folder=task_folder,
            length=length, windows=windows, bos=bos.value, device=device, dtype=dtype, revision=revision, progress=bar,
            note=show_note,
        )  # fmt: skip
    print(json.dumps(result, indent=2)) if json_output else out_console.print(render_eval(result))


@app.command()
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
            help="packed is smaller; dense loads everywhere; deci is a Llama with blocks of their own sizes, for vLLM. "
            "Without it a packed OLD becomes dense, any other packed.",
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Convert a checkpoint between packed and dense, without the original model."""
    from paredown.compress.run.export import export as run
    from paredown.evaluation.terminal import out_console, step_bar

    with step_bar("exporting") as bar:
        result = run(folder, out, format.value if format else None, bar)
    sizes = result["bytes"]
    summary = f"{out}: {result['format']}, {sizes['before'] / 1e6:.1f} MB -> {sizes['after'] / 1e6:.1f} MB of weights"
    print(json.dumps(result, indent=2)) if json_output else out_console.print(summary)


@app.command()
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
) -> None:
    """Measure how fast a checkpoint runs, end to end and per layer; beside its dense original with --against."""
    from paredown.compress.run.bench import bench as run
    from paredown.compress.run.bench import parse_batches
    from paredown.evaluation.speed import Settings
    from paredown.evaluation.speed_report import render_bench
    from paredown.evaluation.terminal import out_console, show_note, step_bar

    settings = Settings(parse_batches(batch), context, decode, repeats)
    with step_bar("measuring") as bar:
        result = run(
            model, against, settings=settings, out=out, device=device, dtype=dtype, revision=revision, progress=bar,
            note=show_note,
        )  # fmt: skip
    print(json.dumps(result, indent=2)) if json_output else out_console.print(render_bench(result))


@app.command()
def tune(
    folders: Annotated[list[Path], typer.Argument(help="Packed checkpoints whose products to time.", metavar="DIR...")],
    device: Device = "auto",
    json_output: Json = False,
) -> None:
    """Time every kernel on this GPU for the sizes of these checkpoints, and keep the table that products are chosen by."""
    from paredown.compress.run.tune import tune as run
    from paredown.evaluation.terminal import out_console, step_bar

    with step_bar("tuning") as bar:
        table, file = run(folders, device, bar)
    summary = f"{file}: {len(table.choices)} choices for {table.device}"
    print(table.to_json()) if json_output else out_console.print(summary)


@app.command()
def verify(folder: Annotated[Path, typer.Argument(help="A checkpoint that paredown wrote.", metavar="DIR")]) -> None:
    """Check names, shapes, hashes, masks, sparsity, tokens, and losses by from_pretrained. Exits with 1 on any fault."""
    from paredown.compress.run.verify import verify as run

    faults = run(folder, print)
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        raise typer.Exit(1)
    print(f"{folder}: sound")


@app.command()
def recipes(name: Annotated[str | None, typer.Argument(help="Show this one, with its citation.")] = None) -> None:
    """List the shipped recipes, or show one."""
    from paredown.commands.display import show_recipe, show_recipes

    show_recipes() if name is None else show_recipe(name)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o")] = Path("out/demo"),
    json_output: Json = False,
) -> None:
    """Prune the bundled model to 2:4 by SparseGPT, score it on the bundled text and task, and write the checkpoint."""
    from paredown.commands.display import now_line, show_block
    from paredown.compress.run.compress import compress as run
    from paredown.evaluation.reference import model_path
    from paredown.evaluation.terminal import show_note

    with now_line() as doing:
        report = run(
            str(model_path()), "sparsegpt-2of4", out, tasks=("stdlib_lines",), progress=show_block, note=show_note,
            doing=doing, command="paredown " + _shell(sys.argv[1:]),
        )  # fmt: skip
    _print_report(report, json_output)


def _print_report(report: "Report", json_output: bool) -> None:
    from paredown.evaluation.report import render
    from paredown.evaluation.terminal import out_console

    print(json.dumps(report, indent=2)) if json_output else out_console.print(render(report))


def _names(tasks: str | None) -> tuple[str, ...] | None:
    return None if tasks is None else tuple(name.strip() for name in tasks.split(",") if name.strip())


def _shell(arguments: list[str]) -> str:
    import shlex

    return shlex.join(arguments)


class _Stopped(BaseException):
    """Raised by Ctrl-C, SIGTERM and SIGHUP. Typer catches KeyboardInterrupt, and not this."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP raise _Stopped, so that `with` blocks can clean up. `nohup` still protects from SIGHUP."""

    def stop(number: int, frame: Any) -> None:
        raise _Stopped

    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main() -> None:
    """Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_codes():
        app()


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn a PareError and an interruption into a message on standard error and an exit code, as every command does."""
    try:
        with _interruptible():
            yield
    except ValueError as fault:
        # importing PareError would import transformers, which `paredown --help` must not wait for
        if type(fault).__name__ != "PareError":
            raise
        print(f"error: {fault}", *_notes(fault), sep="\n", file=sys.stderr)
        sys.exit(1)
    except _Stopped as stopped:
        print("interrupted:", *(_notes(stopped) or ["nothing was written"]), file=sys.stderr)
        sys.exit(130)


def _notes(fault: BaseException) -> list[str]:
    return getattr(fault, "__notes__", [])


if __name__ == "__main__":
    main()
