"""`paredown recipes`."""

from typing import Annotated

import typer


def recipes(name: Annotated[str | None, typer.Argument(help="Show this one, with its citation.")] = None) -> None:
    """List the shipped recipes, or show one."""
    from paredown.commands.display import show_recipe, show_recipes

    show_recipes() if name is None else show_recipe(name)
