"""How long a whole run takes: all stages, and what of it the user's cache spares."""

from collections.abc import Sequence

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import Job
from paredown.compress.recipe import Recipe
from paredown.compress.run.baseline import Baseline
from paredown.compress.run.probe import walk_seconds
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.survey_cache import is_kept
from paredown.compress.shape_job import ShapeJob, resolve
from paredown.compress.text.windows import Windows


def stage_seconds(
    first: Job | ShapeJob, every: Sequence[Recipe], text: Windows, evaluations: Sequence[Windows], cache: bool
) -> tuple[dict[str, float], str]:
    """Seconds of each step of all stages, of which the last one is scored, and why they cannot be told, if so.

    A stage is timed on the model as it is now. `cache`: the dense model's scores and its survey may have been kept.
    """
    scores, known = (ScoreCache.of_user(), _known(first.source, evaluations)) if cache else (None, set[int]())
    total: dict[str, float] = {}
    try:
        for n, recipe in enumerate(every, 1):
            job = first if n == 1 else resolve(first.source, recipe)
            steps = walk_seconds(job, text, evaluations if n == len(every) else [], known)
            if n == 1 and isinstance(job, Job) and is_kept(job, job.surveyed_of(text.surveyed), scores):
                steps.pop("survey", None)
            for name, seconds in steps.items():
                total[name] = total.get(name, 0.0) + seconds
    except PareError as fault:
        return {}, f"no time: {fault}"
    return total, "the time is without that of the tasks" if every[-1].evaluate.tasks else ""


def _known(source: ModelSource, evaluations: Sequence[Windows]) -> set[int]:
    """The numbers of the texts whose dense scores were kept."""
    kept = ScoreCache.of_user()
    if kept is None or not kept.folder.is_dir():
        return set()
    baseline = Baseline(source, kept)
    return {i for i, text in enumerate(evaluations) if baseline.has(text)}
