"""Turn what a caller names into what a run works on: an open model, the final recipe, windows of text."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from paredown.compress.checkpoint.hub import resolve
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device, pick_dtype
from paredown.compress.recipe import Recipe
from paredown.compress.text.windows import Windows

UNLIMITED = 1 << 30  # tokens


def open_source(model: str, revision: str | None = None, device: str = "auto", dtype: str = "auto") -> ModelSource:
    """Open the model of a folder or hub id; its weights are not read yet. Raises PareError if there is none to be read."""
    folder, commit = resolve(model, revision)
    return ModelSource(folder, model, commit, pick_dtype(dtype), pick_device(device))


@contextmanager
def opened(
    model: Any, tokenizer: Any = None, revision: str | None = None, device: str = "auto", dtype: str = "auto"
) -> Iterator[ModelSource]:
    """As `open_source`, and of a loaded transformers model too: it is saved to a temporary folder for as long as it is open.

    Raises PareError for anything else than a folder, a hub id, or a transformers model with its tokenizer.
    """
    if isinstance(model, str | Path):
        yield open_source(str(model), revision, device, dtype)
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        name = type(model).__name__
        what = f"an nn.Module ({name})" if isinstance(model, nn.Module) else f"a {name}"
        raise PareError(
            f"model is {what}; wanted a folder, a hub id, or a transformers PreTrainedModel "
            "with tokenizer=... beside it. Save other models as a transformers folder first."
        )
    if tokenizer is None:
        raise PareError("a loaded model needs its tokenizer too: compress(model, ..., tokenizer=tokenizer).")
    with TemporaryDirectory(prefix="paredown-") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        source = open_source(folder, None, device, dtype)
        source.id = model.name_or_path or type(model).__name__
        yield source


def max_length(source: ModelSource) -> int:
    """The longest window that the model's config allows, in tokens; UNLIMITED for state-space models."""
    config = source.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((int(value) for value in named if value), UNLIMITED)


def embedding_rows(model: Any) -> int:
    """How many tokens a transformers model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def resolve_recipe(
    recipe: Recipe | str,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    seed: int | None = None,
    plugins: Sequence[str | Path] = (),
    allow_scored: bool = False,
) -> Recipe:
    """The recipe with the caller's changes: arguments as in `compress`. Raises PareError listing every fault."""
    if isinstance(recipe, Recipe) and overrides:
        raise PareError("overrides change a recipe named by a string; change a Recipe with model_copy(update=...).")
    resolved = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides, plugins)
    raw = resolved.to_dict()
    if isinstance(recipe, Recipe) and plugins:
        raw["plugins"] = [*resolved.plugins, *map(str, plugins)]
    if calibration is not None:
        raw["calibration"].pop("sources", None)
        raw["calibration"]["source"] = calibration
    if seed is not None:
        raw["calibration"]["seed"] = seed
    if allow_scored:
        raw["calibration"]["allow_scored"] = True
    if eval_text:
        raw["evaluate"]["perplexity"] = list(eval_text)
    if tasks is not None:
        raw["evaluate"]["tasks"] = list(tasks)
    return Recipe.parse(raw)


def check_ids(windows: Windows, source: ModelSource) -> None:
    """Raise PareError for tokens that the model has no embedding for: its tokenizer is another model's."""
    rows, largest = embedding_rows(source.model), int(windows.ids.max())
    if largest >= rows:
        raise PareError(
            f"the tokenizer in {source.folder} gives token {largest} for {windows.corpus}, and the model's embedding has "
            f"{rows} rows: they are not of the same model. Copy the tokenizer files of this model into the folder."
        )
