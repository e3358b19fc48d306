"""A recipe that compresses and then recovers: the compressed checkpoint lies beside OUT until it is recovered."""

from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING, Any

from paredown.compress.checkpoint.out_folder import OutFolder
from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run.once import How, compress_once
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.stages import compress_stages, finished
from paredown.evaluation.schema import Report

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress_and_recover(
    model: "str | Path | PreTrainedModel",
    recipe: Recipe,
    out: Path,
    how: How,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> Report:
    """`compress` by a recipe with `recover`. A compression that is finished is not done again by the same command."""
    if not recipe.compresses:
        recipe.build()  # says so
    if not isinstance(model, str | Path):
        raise PareError(
            "a recipe with recover reads its model from the disk: save yours with save_pretrained, and name the folder."
        )
    OutFolder(out).look()
    place = out.with_name(f"{out.name}.stages")
    folder = place / "compressed"
    silent: dict[str, Any] = {"evaluate": {"perplexity": [], "tasks": []}, "recover": []}
    inner = Recipe.parse({**recipe.to_dict(), **silent})
    run = compress_stages if inner.stages else compress_once
    if finished(folder, str(model), inner) is None:
        place.mkdir(parents=True, exist_ok=True)
        run(model, inner, folder, replace(how, command=None, samples=False, later=recipe.evaluate))
    how.progress.note("recovering what was compressed")
    own = replace(how, revision=None)
    report = recover_once(folder, model, recipe, out, own, revision=how.revision)
    rmtree(place, ignore_errors=True)
    return report
