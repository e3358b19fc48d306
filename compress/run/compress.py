"""The whole run: check everything, walk the model, score the tasks, write report and card, verify, commit."""

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer, resolve
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.machine import peak_memory, pick_device, pick_dtype, resident_memory, return_freed_memory
from paredown.compress.recipe import Recipe
from paredown.compress.run.export import write_config
from paredown.compress.run.journal import Journal, key_of
from paredown.compress.run.pipeline import BlockDone, Result, Run
from paredown.compress.run.plan import Plan, check_room, make_plan
from paredown.compress.run.write import Format
from paredown.compress.text.corpora import load_corpus, overlap
from paredown.compress.text.windows import Windows, calibration_windows, evaluation_windows
from paredown.evaluation.lm_tasks import TaskScores, check_tasks, compare_tasks, run_tasks
from paredown.evaluation.report import model_card
from paredown.evaluation.schema import SCHEMA, check_report
from paredown.evaluation.surroundings import versions

Note = Callable[[str], None]
UNLIMITED = 1 << 30
RECORDED = ("kept", "sparsity", "kind", "rank", "relative_error")  # of each layer, in paredown.json


def compress(
    model: str | Path,
    recipe: Recipe | str,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    calibration: str | None = None,
    eval_text: Sequence[str] = (),
    tasks: Sequence[str] | None = None,
    task_folder: Path | None = None,
    format: Format = "packed",
    device: str = "auto",
    dtype: str = "auto",
    seed: int | None = None,
    revision: str | None = None,
    progress: Callable[[BlockDone], None] = lambda done: None,
    note: Note = lambda text: None,
    doing: Note = lambda text: None,
    command: str | None = None,
) -> dict[str, Any]:
    """Compress `model` (a folder or hub id) by `recipe` (shipped name, YAML file or Recipe) into the folder `out`.

    `overrides` are `key=value` changes of a named recipe; `calibration`, `eval_text`, `tasks` and `seed` replace the
    recipe's. `progress` is called after each block, `note` with what stays worth reading, `doing` with what takes its time
    just now. Returns the report, which is also written to `out/report.json`.
    Raises PareError, before any weight is read where that is possible; `out` is then not there.
    """
    began = perf_counter()
    out = Path(out)
    recipe = _settle(recipe, overrides, calibration, eval_text, tasks, seed)
    method = recipe.build()
    check_tasks(recipe.evaluate.tasks, task_folder, data=True)
    source = open_source(str(model), revision, device, dtype)
    tokenizer = load_tokenizer(source.folder)
    base = resident_memory()  # libraries, and a model without weights: what the plan's memory comes on top of
    with CheckpointWriter(out, resumable=True) as writer:
        note(f"reading text: {', '.join([recipe.calibration.source, *recipe.evaluate.perplexity])}")
        windows, evaluations, warnings = _texts(recipe, source, tokenizer)
        plan = make_plan(source, recipe, method, (windows.tokens, [w.tokens for w in evaluations]), format)
        if not plan.targeted:
            raise PareError(
                "the targets of the recipe leave no layer to compress. Change targets.include or targets.skip."
            )
        check_room(plan, out, source.device.type)
        return_freed_memory()  # of tokenising
        key = key_of(source, recipe, [windows, *evaluations], format, versions())
        journal = Journal(writer, key, note)
        result = Run(source, recipe, method, windows, evaluations, writer, format, progress, note, journal, doing).run()
        _write_checkpoint(writer, source, recipe, result, format, windows)
        scored = perf_counter()
        compared, remarks = _tasks(recipe, source, writer.folder, tokenizer, task_folder, note)
        result.seconds["tasks"] = perf_counter() - scored
        warnings += remarks
        if writer.bytes >= plan.bytes_before and format == "packed":
            warnings.append("the packed checkpoint is not smaller than the dense one: nothing was gained on disk")
        result.seconds["total"] = result.seconds.get("total", 0.0) + perf_counter() - began
        report = make_report(source, recipe, plan, result, windows, compared, writer.bytes)
        report.update(format=format, command=command, warnings=warnings, memory_base_bytes=base)
        check_report(report)
        writer.write_json("report.json", report)
        writer.write_text("README.md", model_card(report))
        note("verifying what was written, in a new process")
        _verify(writer.folder)
        writer.commit()
    return report


def plan_only(
    model: str, recipe: str, overrides: Sequence[str], format: Format, device: str, dtype: str, revision: str | None
) -> Plan:
    """The plan with the recipe's own window counts, without reading any text: evaluation texts count as 64 windows."""
    settled = _settle(recipe, overrides, None, (), None, None)
    source = open_source(model, revision, device, dtype)
    longest = max_length(source)
    spec, scored = settled.calibration, settled.evaluate
    tokens = spec.sequences * min(spec.length, longest)
    texts = [(scored.windows or 64) * min(scored.length, longest) for _ in scored.perplexity]
    return make_plan(source, settled, settled.build(), (tokens, texts), format)


def open_source(model: str, revision: str | None, device: str, dtype: str) -> ModelSource:
    folder, commit = resolve(model, revision)
    return ModelSource(folder, model, commit, pick_dtype(dtype), pick_device(device))


def max_length(source: ModelSource) -> int:
    """The longest window the model allows, by its config; state-space models allow any."""
    config = source.config.get_text_config()
    named = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx"))
    return next((int(value) for value in named if value), UNLIMITED)


def make_report(
    source: ModelSource,
    recipe: Recipe,
    plan: Plan,
    result: Result,
    windows: Windows,
    tasks: dict[str, Any],
    bytes_after: int,
) -> dict[str, Any]:
    """report.json, schema version SCHEMA."""
    told = windows.provenance()
    return {
        "schema": SCHEMA,
        "model": {
            "id": source.id,
            "revision": source.revision,
            "family": source.family,
            "parameters": plan.parameters,
            "tokenizer_sha256": source.tokenizer_sha256(),
        },
        "recipe": recipe.to_dict(),
        "calibration": {"source": told.pop("corpus"), **told},
        "evaluation": result.evaluation,
        "tasks": tasks,
        "parameters": {"total": plan.parameters, "targeted": result.targeted, "kept": result.kept},
        "bytes": {"before": plan.bytes_before, "after": bytes_after},
        "layers": result.layers,
        "left_dense": plan.left_out,
        "unsupported": plan.unsupported,
        "seconds": {key: round(value, 3) for key, value in result.seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "fallbacks": result.fallbacks,
        "versions": versions(),
    }


def _settle(
    recipe: Recipe | str,
    overrides: Sequence[str],
    calibration: str | None,
    eval_text: Sequence[str],
    tasks: Sequence[str] | None,
    seed: int | None,
) -> Recipe:
    """The recipe with what the caller changes."""
    if isinstance(recipe, Recipe) and overrides:
        raise PareError("overrides change a recipe named by a string; change a Recipe with model_copy(update=...).")
    settled = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe, overrides)
    raw = settled.to_dict()
    if calibration is not None:
        raw["calibration"]["source"] = calibration
    if seed is not None:
        raw["calibration"]["seed"] = seed
    if eval_text:
        raw["evaluate"]["perplexity"] = list(eval_text)
    if tasks is not None:
        raw["evaluate"]["tasks"] = list(tasks)
    return Recipe.parse(raw)


def _texts(recipe: Recipe, source: ModelSource, tokenizer: Any) -> tuple[Windows, list[Windows], list[str]]:
    spec, scored, longest = recipe.calibration, recipe.evaluate, max_length(source)
    corpus = load_corpus(spec.source, "calibration")
    windows = calibration_windows(corpus, tokenizer, spec.sequences, spec.length, spec.seed, longest)
    found, warnings = [], []
    for name in scored.perplexity:
        text = load_corpus(name, "evaluation")
        found.append(evaluation_windows(text, tokenizer, scored.length, longest, scored.windows))
        warnings += [said for said in [overlap(corpus, text)] if said]
    return windows, found, warnings


def _write_checkpoint(
    writer: CheckpointWriter, source: ModelSource, recipe: Recipe, result: Result, format: Format, windows: Windows
) -> None:
    """All of the checkpoint but report and card."""
    with result.timed("write"):
        writer.finish(
            {
                "recipe": recipe.to_dict(),
                "model": source.provenance(),
                "calibration": windows.provenance(),
                "format": format,
                "tied": source.tied,
                "verbatim": source.verbatim,
                "layers": {
                    layer["name"]: {key: layer[key] for key in RECORDED if key in layer} for layer in result.layers
                },
                "probe": result.probe,
                "versions": versions(),
            }
        )
        write_config(writer, source, format, result.modules)
        writer.copy(source.companions())


def _tasks(
    recipe: Recipe, source: ModelSource, written: Path, tokenizer: Any, folder: Path | None, note: Note
) -> tuple[dict[str, Any], list[str]]:
    """Tasks before and after, and lm-eval's remarks."""
    if not recipe.evaluate.tasks:
        return {}, []
    note(f"scoring tasks before and after: {', '.join(recipe.evaluate.tasks)}")
    before = score_tasks(source.folder, source, tokenizer, recipe.evaluate.tasks, folder)
    after = score_tasks(written, source, tokenizer, recipe.evaluate.tasks, folder)
    return compare_tasks(before, after), list(dict.fromkeys([*before.notes, *after.notes]))


def score_tasks(
    folder: Path, source: ModelSource, tokenizer: Any, names: Sequence[str], task_folder: Path | None
) -> TaskScores:
    """lm-eval needs the whole model in memory; it is dropped afterwards."""
    model = transformers_plugin.load(folder, dtype=source.dtype).to(source.device).eval()
    try:
        return run_tasks(model, tokenizer, names, include=task_folder)
    finally:
        del model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _verify(folder: Path) -> None:
    """What we write we reload and compare: in a process that has seen nothing of the run."""
    done = subprocess.run(
        [sys.executable, "-m", "paredown.commands.app", "verify", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise PareError(
            f"what was written did not pass verification, and was removed:\n{done.stderr.strip()}\n"
            "This is a fault of paredown or of the disk: please report it with the lines above."
        )
