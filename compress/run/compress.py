"""The whole run: check everything, walk the model, score the tasks, write report and card, verify, commit."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, cast

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job, resolve_job
from paredown.compress.machine import resident_memory, return_freed_memory
from paredown.compress.progress import BlockDone, Progress, ignore, logger
from paredown.compress.recipe import Recipe
from paredown.compress.run.evaluate import score_tasks
from paredown.compress.run.journal import SAVE_EVERY, Journal, key_of
from paredown.compress.run.open import opened, read_texts, resolve_recipe
from paredown.compress.run.pipeline import Run
from paredown.compress.run.plan import Plan, check_room, make_plan
from paredown.compress.run.record import make_report, write_record
from paredown.compress.run.tokens import check_companions
from paredown.compress.text.windows import Windows
from paredown.evaluation.lm_tasks import check_tasks, compare_tasks
from paredown.evaluation.report import model_card
from paredown.evaluation.schema import Report
from paredown.evaluation.surroundings import versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def compress(
    model: "str | Path | PreTrainedModel",
    recipe: Recipe | str,
    out: str | Path,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    overrides: Sequence[str] = (),
    plugins: Sequence[str | Path] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    format: Format = "packed",
    device: str = "auto",
    dtype: str = "auto",
    seed: int | None = None,
    revision: str | None = None,
    progress: Callable[[BlockDone], None] = ignore,
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    save_every: float = SAVE_EVERY,
    command: str | None = None,
) -> Report:
    """Compress `model` by `recipe` (shipped name, YAML file or Recipe) into the folder `out`, and return the report.

    model: a folder or hub id, read block by block; or a loaded model with its `tokenizer`, which is saved to a temporary
    folder first: for small models. `overrides` are `key=value` changes of a named recipe; `plugins` are Python files that
    register methods of your own; `calibration`, `eval_text`, `tasks` and `seed` replace the recipe's. `progress` is called
    after each block, `note` with sentences worth keeping, `doing` with the current step. A run of a folder or hub id saves
    its state every `save_every` seconds, from which the same call resumes after an interruption. The report is also
    written to `out/report.json`.

    Raises PareError, if possible before any weight is read; `out` then does not exist.
    """
    began, out = perf_counter(), Path(out)
    resumable = isinstance(model, str | Path)
    resolved = resolve_recipe(recipe, overrides, calibration, eval_text, tasks, seed, plugins)
    check_tasks(resolved.evaluate.tasks, task_folder, data=True)
    with opened(model, tokenizer, revision, device, dtype) as source:
        text_tokenizer = load_tokenizer(source.folder)
        memory_base = resident_memory()  # libraries and a model without weights; the plan's memory comes on top
        with CheckpointWriter(out, resumable) as writer:
            calibrating = [name for name in (resolved.calibration.source, resolved.calibration.domain) if name]
            note(f"reading text: {', '.join([*calibrating, *resolved.evaluate.perplexity])}")
            windows, evaluations, warnings = read_texts(resolved, source, text_tokenizer)
            warnings += [*source.remarks, *check_companions(source.folder, text_tokenizer)]
            job = resolve_job(source, resolved, format)
            plan = _checked_plan(job, windows, evaluations, out, writer.left)
            return_freed_memory()  # of tokenising
            key = key_of(job, [windows, *evaluations], versions())
            if resumable and writer.commit_finished(key):
                note(f"the checkpoint was finished before, and stands at {out} now")
                return cast(Report, json.loads((out / "report.json").read_text(encoding="utf-8")))
            journal = Journal(writer, key, note, save_every) if resumable else None
            result = Run(job, windows, evaluations, writer, Progress(progress, note, doing), journal).run()
            write_record(writer, job, result, windows, text_tokenizer)
            with result.timed("tasks"):
                scores, remarks = _tasks(job, writer.folder, text_tokenizer, task_folder, note)
            warnings += [*remarks, *result.pruned_before()]
            if writer.bytes >= plan.bytes_before and format == "packed":
                warnings.append("the packed checkpoint is not smaller than the dense one: nothing was gained on disk")
            result.seconds["total"] = result.seconds.get("total", 0.0) + perf_counter() - began
            report = make_report(
                job,
                plan,
                result,
                windows,
                scores,
                writer.bytes,
                command=command,
                warnings=warnings,
                memory_base=memory_base,
            )
            writer.write_json("report.json", report)
            writer.write_text("README.md", model_card(report))
            note("verifying what was written, in a new process")
            try:
                _verify(writer.folder, note)
            except PareError:
                writer.keep = True
                raise
            writer.commit()
    return report


def _checked_plan(job: Job, windows: Windows, evaluations: Sequence[Windows], out: Path, written: int) -> Plan:
    """The plan of a run on these texts. Raises PareError if there is nothing to compress, or no room for it.

    written: bytes that a stopped run has left.
    """
    plan = make_plan(job, windows.tokens, [w.tokens for w in evaluations])
    if not plan.targeted:
        raise PareError("the targets of the recipe leave no layer to compress. Change targets.include or targets.skip.")
    check_room(plan, out, written)
    return plan


def _tasks(
    job: Job, written: Path, tokenizer: Any, folder: Path | None, note: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """Scores of the recipe's tasks before and after, and lm-eval's remarks."""
    names, source = job.recipe.evaluate.tasks, job.source
    if not names:
        return {}, []
    note(f"scoring tasks before and after: {', '.join(names)}")
    before = score_tasks(source.folder, source, tokenizer, names, folder, job.recipe.bos)
    after = score_tasks(written, source, tokenizer, names, folder, job.recipe.bos)
    return compare_tasks(before, after), list(dict.fromkeys([*before.notes, *after.notes]))


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
