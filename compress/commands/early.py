"""What can be refused before torch is imported, which takes seconds. Each check is a part of what the command does later."""

from collections.abc import Sequence
from pathlib import Path


def check(
    *models: str | None,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    push: str | None = None,
    log_to: str | None = None,
) -> None:
    """Raises PareError for a folder that is not there, an OUT that is not free, and a recipe that is none by its keys.

    The same for a repository that the user may not `push` to, which the Hub is asked, and a board that is not installed.

    What is None is not looked at.
    """
    from paredown.compress.checkpoint.hub import local
    from paredown.compress.checkpoint.out_folder import OutFolder
    from paredown.compress.recipe import Recipe
    from paredown.compress.run.boards import check_board

    if recipe is not None:
        Recipe.outline(recipe, overrides)
    for model in models:
        if model is not None:
            local(model)
    if out is not None:
        OutFolder(out).look()
    check_board(log_to)
    if push is not None:
        from paredown.compress.run.push import check_push

        check_push(push)
