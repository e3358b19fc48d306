"""One method on one model: check everything, walk the model, score the tasks, write report and card, verify, commit."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, cast

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import SCORES, CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job
from paredown.compress.machine import resident_memory, return_freed_memory
from paredown.compress.progress import Progress
from paredown.compress.recipe import EvaluateSpec, Recipe
from paredown.compress.run.journal import SAVE_EVERY, Journal, key_of
from paredown.compress.run.open import opened
from paredown.compress.run.pipeline import Run
from paredown.compress.run.plan import Plan, check_room, make_plan
from paredown.compress.run.record import make_report, write_record, write_report
from paredown.compress.run.remarks import only_stdlib
from paredown.compress.run.run_log import RunLog
from paredown.compress.run.score_cache import ScoreCache
from paredown.compress.run.smaller import SmallerRun
from paredown.compress.run.texts import open_texts, read_texts
from paredown.compress.run.tokens import check_companions
from paredown.compress.run.whole import Asked, ask, side_by_side
from paredown.compress.run.words import add_words, documents_of
from paredown.compress.shape_job import ShapeJob, check_ordinary, resolve
from paredown.compress.text.windows import Windows
from paredown.evaluation.lm_tasks import check_tasks
from paredown.evaluation.schema import Report, Sample, SeedResult
from paredown.evaluation.seeds import with_seeds
from paredown.evaluation.surroundings import versions
from paredown.evaluation.task_scores import compare_tasks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class How:
    """What a caller says of a run besides model, recipe and output: see `compress`."""

    task_folder: Path | None = None
    format: Format = "packed"
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    progress: Progress = Progress()  # noqa: RUF009 - it is frozen
    save_every: float = SAVE_EVERY
    command: str | None = None
    passing: bool = False  # what is written is read by a further stage and removed then
    uneven: bool = False  # it may have sizes of its own, though what is written is dense
    later: EvaluateSpec | None = None  # what that stage or one after it scores: such text does not calibrate this one
    seeds: Sequence[SeedResult] = ()  # what the same recipe came to by other seeds
    allow_task_code: bool = False
    samples: bool = False
    words: bool = False
    cache: ScoreCache | None = None  # of the dense model's scores
    remote_code: bool = False
    log: RunLog | None = None

    def log_into(self, folder: Path) -> None:
        """From now on the log is written into this folder."""
        if self.log is not None:
            self.log.into(folder)

    def log_scores(self, report: Report) -> None:
        if self.log is not None:
            self.log.scores(report)


class Earlier(Protocol):
    """The stages before this one."""

    def source(self, like: ModelSource) -> ModelSource:
        """The dense model, which scores are compared with, on the device and in the dtype of another."""
        ...

    def merged(self, report: Report) -> Report:
        """The report of all stages together; `report` is of the last."""
        ...


def compress_once(
    model: "str | Path | PreTrainedModel",
    recipe: Recipe,
    out: Path,
    how: How,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    earlier: Earlier | None = None,
) -> Report:
    """`compress` by a recipe of one method."""
    began, resumable, note = perf_counter(), isinstance(model, str | Path), how.progress.note
    with opened(model, tokenizer, how.revision, how.device, how.dtype) as source:
        text_tokenizer = load_tokenizer(source.folder)
        memory_base = resident_memory()  # libraries and a model without weights; the plan's memory comes on top
        with CheckpointWriter(out, resumable, remote_code=how.remote_code) as writer:
            calibrating = [name for name in (recipe.calibration.named, recipe.calibration.domain) if name]
            note(f"reading text: {', '.join([*calibrating, *recipe.evaluate.perplexity])}")
            windows, evaluations, warnings = read_texts(recipe, source, text_tokenizer, how.later, note)
            warnings += [*source.remarks, *check_companions(source.folder, text_tokenizer)]
            calibration = [text.source for text in recipe.calibration.texts]
            remarks = list(only_stdlib(source, calibration, recipe.evaluate.perplexity))
            for remark in remarks:
                note(remark)
            warnings += remarks
            documents = _documents(recipe, evaluations, text_tokenizer, warnings) if how.words and evaluations else ()
            job = resolve(source, recipe, how.format)
            if how.format == "dense" and not how.uneven:
                check_ordinary(job)
            plan = _checked_plan(job, windows, evaluations, out, writer.left)
            return_freed_memory()  # of tokenising
            key = key_of(job, [windows, *evaluations], versions())
            if resumable and writer.commit_finished(key):
                note(f"the checkpoint was finished before, and stands at {out} now")
                return cast(Report, json.loads((out / "report.json").read_text(encoding="utf-8")))
            journal = Journal(writer, key, note, how.save_every) if resumable else None
            how.log_into(writer.folder)
            dense = earlier.source(source) if earlier else None
            if isinstance(job, ShapeJob):
                result = SmallerRun(job, windows, evaluations, writer, how.progress, journal, dense, how.cache).run()
            else:
                result = Run(job, windows, evaluations, writer, how.progress, journal, dense, how.cache).run()
            write_record(writer, job, result, windows, text_tokenizer)
            with result.timed("tasks"):
                scores, samples, remarks = answered(
                    recipe, source, dense or source, writer.folder, text_tokenizer, how, documents, result.evaluation
                )
            warnings += [*remarks, *result.pruned_before()]
            if writer.bytes >= plan.bytes_before and job.format == "packed":
                warnings.append("the packed checkpoint is not smaller than the dense one: nothing was gained on disk")
            result.seconds["total"] = result.seconds.get("total", 0.0) + perf_counter() - began
            report = make_report(
                job,
                plan,
                result,
                windows,
                scores,
                {name: record["bytes"] for name, record in writer.tensors.items()},
                command=how.command,
                warnings=warnings,
                memory_base=memory_base,
            )
            if samples:
                report["samples"] = samples
            report = earlier.merged(report) if earlier else report
            report = with_seeds(report, how.seeds)
            how.log_scores(report)
            write_report(writer, report, source.folder, note)
            commit_verified(writer, note)
    return report


def _checked_plan(
    job: Job | ShapeJob, windows: Windows, evaluations: Sequence[Windows], out: Path, written: int
) -> Plan:
    """The plan of a run on these texts. Raises PareError if there is nothing to compress, or no room for it.

    written: bytes that a stopped run has left.
    """
    plan = make_plan(job, windows.tokens, [w.tokens for w in evaluations])
    if not plan.targeted:
        raise PareError("the targets of the recipe leave no layer to compress. Change targets.include or targets.skip.")
    check_room(plan, out, written)
    return plan


def _documents(
    recipe: Recipe, evaluations: Sequence[Windows], tokenizer: Any, warnings: list[str]
) -> tuple[tuple[str, ...], ...]:
    """The documents of each scored text whose word perplexity is asked for; `warnings` gains a sentence if there are none."""
    scoring = open_texts(recipe, tokenizer)[1]
    found = tuple(documents_of(corpus, cut, tokenizer) for corpus, cut in zip(scoring, evaluations, strict=True))
    if not any(found):
        warnings.append("no scored text has documents, so there is no word perplexity")
        return ()
    return found


def answered(
    recipe: Recipe,
    source: ModelSource,
    dense: ModelSource,
    written: Path,
    tokenizer: Any,
    how: How,
    documents: tuple[tuple[str, ...], ...] = (),
    entries: Sequence[dict[str, Any]] = (),
) -> tuple[dict[str, Any], list[Sample], list[str]]:
    """Scores of the recipe's tasks by the dense model and by what was written, samples of both, and lm-eval's remarks.

    Both run on the device and in the dtype of `source`. The `entries` of texts gain the word perplexity of their `documents`.
    """
    names, note = recipe.evaluate.tasks, how.progress.note
    digests = check_tasks(names, how.task_folder, allow_code=how.allow_task_code, data=True)
    samples = how.samples and not how.passing
    asked = Asked(digests, how.task_folder, how.allow_task_code, recipe.bos, samples, documents)
    if not asked:
        return {}, [], []
    note(f"scoring tasks before and after: {', '.join(names)}" if names else "running both models whole")
    folder = written / SCORES
    before = ask(dense.folder, source, tokenizer, asked, folder / "before", how.cache, note)
    after = ask(written, source, tokenizer, asked, folder / "after")
    add_words(entries, asked.documents, after, before)
    remarks = list(dict.fromkeys([*before.tasks.notes, *after.tasks.notes]))
    return compare_tasks(before.tasks, after.tasks), side_by_side(after.samples, before.samples), remarks


def commit_verified(writer: CheckpointWriter, note: Callable[[str], None]) -> None:
    """Put what was written in its place once it is verified. Raises PareError if it is not sound; it is kept aside then."""
    note("verifying what was written, in a new process")
    try:
        _verify(writer.folder, note)
    except PareError:
        writer.keep = True
        raise
    writer.commit()


def _verify(folder: Path, note: Callable[[str], None]) -> None:
    """Reload and check what was written, in a process that has seen nothing of the run; `note` gets what it remarks."""
    done = subprocess.run(
        [sys.executable, "-m", "paredown.commands.app", "verify", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PareError(
            f"what was written did not pass verification, and is left in {folder}:\n{done.stderr.strip()}\n"
            "This is a fault of paredown or of the disk: please report it with the lines above."
        )
    for remark in done.stdout.splitlines()[:-1]:  # the last line says that it is sound
        note(remark)
