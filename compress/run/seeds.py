"""One recipe by several calibration seeds: the first one's checkpoint is kept, of the others only their figures."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

from paredown.compress.checkpoint.out_folder import OutFolder
from paredown.compress.checkpoint.writer import LOG
from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.run.once import How
from paredown.compress.run.stages import finished
from paredown.evaluation.schema import Report, SeedResult
from paredown.evaluation.seeds import seed_result

REPORTS = ("report.json", "report.html", LOG)
Run = Callable[[Any, Recipe, Path, How], Report]


def seeds_of(told: str | int | Sequence[int], first: int) -> tuple[int, ...]:
    """The seeds of `3`, three from `first` on, or of `0,1,2`. Raises PareError for anything else, and for one seed twice."""
    if isinstance(told, str):
        words = [word.strip() for word in told.split(",")]
        if not all(word.isdecimal() for word in words):
            raise PareError(
                f"--seeds {told!r} is neither a number of seeds, as in --seeds 3, nor a list: --seeds 0,1,2."
            )
        told = int(told) if len(words) == 1 else [int(word) for word in words]
    seeds = tuple(range(first, first + told)) if isinstance(told, int) else tuple(told)
    if len(seeds) < 2 or len(set(seeds)) < len(seeds):
        raise PareError(f"--seeds needs at least two different seeds, not {', '.join(map(str, seeds)) or 'none'}.")
    return seeds


def compress_seeds(run: Run, model: Any, recipe: Recipe, seeds: Sequence[int], out: Path, how: How) -> Report:
    """`run` by each seed; the first comes last, into `out`, and its report holds the figures of all.

    The others are written beside `out`, and removed but for their reports, so that the same command goes on after an
    interruption. Raises PareError as `run` does, and for a loaded model.
    """
    if not isinstance(model, str | Path):
        raise PareError(
            "several seeds read the model from the disk: save yours with save_pretrained, and name the folder."
        )
    OutFolder(out).look()
    place = Path(f"{os.path.abspath(out)}.seeds")
    found, note = list[SeedResult](), how.progress.note
    for n, seed in enumerate(seeds[1:], 1):
        note(f"seed {seed}: {n} of {len(seeds)}")
        folder, own = place / str(seed), _with_seed(recipe, seed)
        report = finished(folder, str(model), own)
        if report is None:
            place.mkdir(parents=True, exist_ok=True)
            report = run(model, own, folder, replace(how, command=None))
        strip(folder)
        found.append(seed_result(seed, report))
    note(f"seed {seeds[0]}: {len(seeds)} of {len(seeds)}, whose checkpoint is kept")
    report = run(model, _with_seed(recipe, seeds[0]), out, replace(how, seeds=tuple(found)))
    rmtree(place, ignore_errors=True)
    return report


def _with_seed(recipe: Recipe, seed: int) -> Recipe:
    raw = recipe.to_dict()
    return Recipe.parse({**raw, "calibration": {**raw["calibration"], "seed": seed}})


def strip(folder: Path) -> None:
    """Leave nothing of a checkpoint but its report, for programs and for people."""
    for path in folder.iterdir():
        if path.is_dir():
            rmtree(path)
        elif path.name not in REPORTS:
            path.unlink()
