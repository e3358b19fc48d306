"""The recovery of a finished checkpoint."""

from collections.abc import Callable, Sequence
from pathlib import Path

from paredown.compress.progress import Progress, ignore, logger
from paredown.compress.recipe import Recipe
from paredown.compress.run.boards import Name as Board
from paredown.compress.run.journal import SAVE_EVERY
from paredown.compress.run.once import How
from paredown.compress.run.open import resolve_recipe
from paredown.compress.run.recover_once import recover_once
from paredown.compress.run.run_log import logged
from paredown.compress.run.score_cache import ScoreCache
from paredown.evaluation.lm_tasks import check_tasks
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
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    allow_task_code: bool = False,
    samples: bool = False,
    cache: bool = True,
    device: str = "auto",
    seed: int | None = None,
    revision: str | None = None,
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    save_every: float = SAVE_EVERY,
    command: str | None = None,
    log_to: Board | None = None,
) -> Report:
    """Train what `checkpoint` stores towards the dense model `teacher` into the folder `out`, and return the report.

    checkpoint: a folder that `compress` wrote, or any dense one with zeros or smaller blocks; teacher: the model that it
    was made of, a folder or hub id, of which `revision` is read. `recipe` (shipped name, YAML file or Recipe) has `recover`
    steps; `calibration` is the text to train on, and all else that `compress` takes too means what it means there. Masks,
    N:M patterns and ranks stay as they are. A run saves its state every `save_every` seconds, from which the same call goes
    on after an interruption. The report, also in `out/report.json`, is that of the compression with the steps under
    `recovery`; each text is scored by the dense, the compressed and the recovered model, tasks by the first and the last.

    Raises PareError, if possible before any weight is read; `out` then does not exist.
    """
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, tasks, seed)
    check_tasks(resolved.evaluate.tasks, task_folder, allow_code=allow_task_code, data=True)
    begin = {"model": str(checkpoint), "teacher": str(teacher), "recipe": resolved.to_dict(), "command": command}
    with logged(begin, Path(out), log_to, Progress(note=note, doing=doing)) as (log, shown):
        how = How(
            task_folder, device=device, progress=shown, save_every=save_every, command=command,
            allow_task_code=allow_task_code, samples=samples, cache=ScoreCache.of_user() if cache else None, log=log,
        )  # fmt: skip
        return recover_once(checkpoint, teacher, resolved, Path(out), how, revision)
