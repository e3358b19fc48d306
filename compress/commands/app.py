"""The command line. A command is a function in a file of its own, and a line here; what is heavy it imports when it runs."""

import os
from typing import Annotated

import typer

from paredown.commands.checkpoints import export, verify
from paredown.commands.compare import compare
from paredown.commands.compress import compress, demo
from paredown.commands.evaluate import evaluate
from paredown.commands.exits import exit_codes
from paredown.commands.merge import merge
from paredown.commands.plan import plan
from paredown.commands.recipes import recipes
from paredown.commands.recover import recover
from paredown.commands.speed import bench, tune
from paredown.commands.sweep import sweep

__all__ = ["app", "exit_codes", "main"]

app = typer.Typer(
    help="Post-training compression of language models: prune, score before and after, write a smaller checkpoint.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from paredown.compress import __version__

        print(f"paredown {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("compress")(compress)
app.command("plan")(plan)
app.command("recover")(recover)
app.command("merge")(merge)
app.command("eval")(evaluate)
app.command("export")(export)
app.command("compare")(compare)
app.command("sweep")(sweep)
app.command("bench")(bench)
app.command("tune")(tune)
app.command("verify")(verify)
app.command("recipes")(recipes)
app.command("demo")(demo)


def main() -> None:
    """Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with exit_codes():
        app()


if __name__ == "__main__":
    main()
