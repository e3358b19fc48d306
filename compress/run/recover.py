"""The recovery of a finished checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

from paredown.compress.progress import Progress, ignore, logger
from paredown.compress.recipe import Recipe
from paredown.compress.run.journal import SAVE_EVERY
from paredown.compress.run.once import How
from paredown.compress.run.open import resolve_recipe
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.score_cache import ScoreCache
from paredown.evaluation.schema import Report


def recover(
    checkpoint: str | Path,
    teacher: str | Path,
    recipe: Recipe | str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    cache: bool = True,
    device: str = "auto",
    seed: int | None = None,
    revision: str | None = None,
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    save_every: float = SAVE_EVERY,
    command: str | None = None,
) -> Report:
    """Train what `checkpoint` stores towards the dense model `teacher` into the folder `out`, and return the report.

    checkpoint: a folder that `compress` wrote, or any dense one with zeros or smaller blocks; teacher: the model that it
    was made of, a folder or hub id, of which `revision` is read. `recipe` (shipped name, YAML file or Recipe) has `recover`
    steps; `overrides`, `calibration` (the text to train on), `eval_text`, `seed`, `cache`, `note` and `doing` are as in
    `compress`. Masks, N:M patterns and ranks stay as they are. A run saves its state every `save_every` seconds, from which
    the same call goes on after an interruption. The report, also in `out/report.json`, is that of the compression with the
    steps under `recovery`; each text is scored by the dense, the compressed and the recovered model.

    Raises PareError, if possible before any weight is read; `out` then does not exist.
    """
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, seed=seed)
    how = How(
        device=device, progress=Progress(note=note, doing=doing), save_every=save_every, command=command,
        cache=ScoreCache.of_user() if cache else None,
    )  # fmt: skip
    return recover_once(checkpoint, teacher, resolved, Path(out), how, revision)
