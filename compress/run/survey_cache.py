"""The survey of a dense model, kept by content: runs that differ in what it does not depend on, such as how much is kept,
share it.

An entry is a file of facts and losses, and beside it one of gradients for each block; or the rounds of a greedy choice. What
is damaged or incomplete is measured anew. While one run measures, another that needs the same waits for it. What is measured
during the walk, Gram matrices above all, is not kept: a block's inputs come from the blocks before it as that run has
compressed them.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.disk import save_tensors
from paredown.compress.job import Job
from paredown.compress.progress import ignore
from paredown.compress.recipe import Recipe
from paredown.compress.run.score_cache import ScoreCache, content_key
from paredown.compress.shape_job import ShapeJob
from paredown.compress.survey.rounds import Rounds, Values
from paredown.compress.survey.survey import Survey, survey
from paredown.evaluation.surroundings import versions

FORMAT = 2  # of an entry
FACTS = ".survey.safetensors"


def surveyed(
    job: Job, ids: Tensor, scratch: Path, cache: ScoreCache | None = None, note: Callable[[str], None] = ignore
) -> Survey:
    """`survey`, taken from the folder beside the `cache` of scores where it was measured before, and kept there."""
    measure = partial(survey, job, ids, scratch, note)
    return shared(_key(job, ids), measure, scratch, cache, note) if cache and job.is_surveyed else measure()


def gradients_of(
    job: ShapeJob,
    ids: Tensor,
    measure: Callable[[], Survey],
    scratch: Path,
    cache: ScoreCache | None,
    note: Callable[[str], None] = ignore,
) -> Survey:
    """What a job that removes units `measure`s of gradients at its readers, on the windows `ids`; kept in the same way."""
    if cache is None:
        return measure()
    readers = sorted(group.reader for group in job.all_groups)
    asked = {"format": FORMAT, "readers": readers, "gradients": sorted(job.gradients), "labels": job.method.labels}
    return shared(_content(job, {**asked, **_basis(job.recipe, ids)}), measure, scratch, cache, note)


def shared(
    key: str, measure: Callable[[], Survey], scratch: Path, cache: ScoreCache, note: Callable[[str], None]
) -> Survey:
    """The survey that is kept under a key, or what `measure` gives, which is kept then; gradients are in `scratch`."""
    place = _place(cache)
    with _alone(place.folder, key):
        found = _kept(place, key, scratch)
        if found is not None:
            note(f"what was measured of the dense model is taken from {place.folder} (--no-cache measures anew)")
            return found
        measured = measure()
        _keep(place, key, measured)
        return measured


def rounds_of(
    job: ShapeJob, ids: Tensor, what: str, cache: ScoreCache | None, note: Callable[[str], None] = ignore
) -> Rounds:
    """Those of the job's greedy choice on the windows `ids`; `what` names all else that it depends on.

    They are kept one by one, so that a run which was stopped, and one that removes more, go on after them.
    """
    if cache is None:
        return Rounds()
    place, asked = _place(cache), {"format": FORMAT, "choice": what, **_basis(job.recipe, ids)}
    path = place.folder / f"{_content(job, asked)}.rounds.json"
    known: list[Values] = []
    with suppress(OSError, ValueError):
        known = json.loads(path.read_text(encoding="utf-8"))
        note(f"{len(known)} choices are taken from {place.folder} (--no-cache measures anew)")

    def keep(rounds: list[Values]) -> None:
        with suppress(OSError), place.adding() as new:
            (new / path.name).write_text(json.dumps(rounds), encoding="utf-8")

    return Rounds(known, keep)


def is_kept(job: Job, ids: Tensor, cache: ScoreCache | None) -> bool:
    """Whether the survey need not be measured; what was kept may still turn out to be damaged."""
    if cache is None or not job.is_surveyed:
        return False
    folder = _place(cache).folder
    return folder.is_dir() and (folder / f"{_key(job, ids)}{FACTS}").is_file()


def _place(cache: ScoreCache) -> ScoreCache:
    return replace(cache, folder=cache.folder.with_name("surveys"))


def _key(job: Job, ids: Tensor) -> str:
    """A hash of all that a survey depends on; of the method without what it does not depend on."""
    asked = {
        "format": FORMAT,
        "method": [type(job.method).__module__, repr(job.method.surveyed)],
        "allocation": [job.strategy, repr(job.allocation), sorted(job.surveyed), sorted(job.gradients)],
        "layers": [view.name for view in job.targets],
        **_basis(job.recipe, ids),
    }
    return _content(job, asked)


def _content(job: Job | ShapeJob, asked: dict[str, Any]) -> str:
    return content_key(job.source.folder, job.source, survey=asked)


def _basis(recipe: Recipe, ids: Tensor) -> dict[str, Any]:
    """What everything that is measured here depends on, beside the model."""
    return {
        "text": [hashlib.sha256(ids.numpy().tobytes()).hexdigest(), list(ids.shape)],
        "plugins": [hashlib.sha256(Path(plugin).expanduser().read_bytes()).hexdigest() for plugin in recipe.plugins],
        "threads": torch.get_num_threads(),  # which decide on the order of sums, and so on the last bits
        "versions": versions(),
    }


def _kept(place: ScoreCache, key: str, scratch: Path) -> Survey | None:
    """The survey that was kept under a key, with its gradients in `scratch`; None for none, or damaged."""
    path = place.folder / f"{key}{FACTS}"
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata()["facts"]
            losses = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            whole = file.metadata()["sha256"] == _digest(told, losses)
        facts: dict[str, Any] = json.loads(told)
        for name, digest in facts["files"].items():
            shutil.copyfile(place.folder / f"{key}.{name}", scratch / name)
            whole = whole and file_sha256(scratch / name) == digest
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        for leftover in scratch.iterdir():
            leftover.unlink()
        return None
    place.touch(path.name, *(f"{key}.{name}" for name in facts["files"]))
    return Survey.restored(scratch, facts["survey"], losses)


def _keep(place: ScoreCache, key: str, measured: Survey) -> None:
    """Keep a survey, unless it is larger than the whole cache."""
    files = sorted(measured.scratch.iterdir())
    facts, losses = measured.state()
    if sum(path.stat().st_size for path in files) > place.most:
        return
    with suppress(OSError, SafetensorError), place.adding() as new:
        told = json.dumps({"survey": facts, "files": {path.name: file_sha256(path) for path in files}})
        for path in files:
            shutil.copyfile(path, new / f"{key}.{path.name}")
        save_tensors(losses, new / f"{key}{FACTS}", {"facts": told, "sha256": _digest(told, losses)})


def _digest(told: str, losses: dict[str, Tensor]) -> str:
    numbers = {name: values.tolist() for name, values in sorted(losses.items())}
    return hashlib.sha256((told + json.dumps(numbers)).encode()).hexdigest()


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """No other process is here with the same key, as far as the disk can lock."""
    with ExitStack() as stack:
        with suppress(OSError, NotImplementedError):
            (folder / "locks").mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "locks" / key))
        yield
