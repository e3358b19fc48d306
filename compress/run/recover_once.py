"""Recovery of a finished checkpoint: train what it stores towards the dense model, write it, score three models, verify."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import Format
from paredown.compress.recipe import DistillSpec, Recipe
from paredown.compress.recovery.optimizer import check_optimizer
from paredown.compress.run import once
from paredown.compress.run.baseline import Baseline
from paredown.compress.run.generated_text import with_own_text
from paredown.compress.run.journal import Journal, key_of
from paredown.compress.run.open import open_source
from paredown.compress.run.record import write_report
from paredown.compress.run.recover_blocks import check_compared, check_paired
from paredown.compress.run.recover_report import ThreeModels, recovered_report
from paredown.compress.run.recover_room import check_room
from paredown.compress.run.recover_steps import Steps
from paredown.compress.run.recover_text import recovery_texts
from paredown.compress.run.recover_write import add_probe, carried_record, format_of, write_recovered
from paredown.compress.run.scoring import compare, score, walked
from paredown.compress.run.streams import probe_ids
from paredown.compress.run.tokens import probe_tokens
from paredown.compress.text.windows import Windows
from paredown.evaluation.schema import Report
from paredown.evaluation.surroundings import versions


def recover_once(
    checkpoint: str | Path,
    teacher: str | Path,
    recipe: Recipe,
    out: Path,
    how: once.How,
    revision: str | None = None,
) -> Report:
    """`recover` by a recipe that is resolved; `revision` is the teacher's, and `how.revision` the checkpoint's."""
    if not recipe.recover:
        raise PareError("the recipe has no recover: steps. Add some, or name a recipe that has: -r recover-distill")
    began, note = perf_counter(), how.progress.note
    source = open_source(str(checkpoint), how.revision, how.device)
    dense = open_source(str(teacher), revision, how.device)
    tokenizer = load_tokenizer(source.folder)
    check_teacher(dense, source, tokenizer)
    if any(step.reconstruct for step in recipe.recover):
        check_paired(source, dense)
    for step in recipe.recover:
        if isinstance(step.spec, DistillSpec):
            check_optimizer(step.spec.optimizer, source.device)
            check_compared(step.spec.hidden, source, dense)
    recipe = with_own_text(str(teacher), recipe, replace(how, revision=revision))
    with CheckpointWriter(out, resumable=True) as writer:
        texts = recovery_texts(recipe, source, tokenizer, note)
        check_room(source, dense, [step.spec for step in recipe.recover], texts.steps, out, note)
        key = _key(source, dense, recipe, [*(w for pair in texts.steps for w in pair), *texts.evaluations])
        if writer.commit_finished(key):
            note(f"the checkpoint was finished before, and stands at {out} now")
            return cast(Report, json.loads((out / "report.json").read_text(encoding="utf-8")))
        journal = Journal(writer, key, note, how.save_every)
        how.log_into(writer.folder)
        with writer.scratch() as scratch:
            steps = Steps(source, dense, recipe, texts.steps, journal, scratch, how.progress)
            trained = steps.run()
            write_recovered(writer, source, trained, _record(source, dense, steps, tokenizer))
        answers = once.answered(recipe, source, dense, writer.folder, tokenizer, how)
        models = _scored(source, Baseline(dense, how.cache, note), writer, texts.evaluations, texts.steps[-1][0], note)
        seconds = perf_counter() - began
        report = recovered_report(
            source, dense, recipe, steps.done, models, answers, texts.warnings, writer.bytes, seconds, how
        )
        how.log_scores(report)
        write_report(writer, report, source.folder, note)
        once.commit_verified(writer, note)
    return report


def check_teacher(teacher: ModelSource, source: ModelSource, tokenizer: Any) -> None:
    """Raise PareError if the two models do not read the same tokens."""
    advice = "Name the dense model that the checkpoint was made of: --teacher MODEL"
    same = teacher.tokenizer_sha256() == source.tokenizer_sha256()
    if not same and probe_tokens(load_tokenizer(teacher.folder)) != probe_tokens(tokenizer):
        raise PareError(
            f"{teacher.id} has another tokenizer than {source.id}: its probabilities are of other tokens. {advice}"
        )
    theirs, ours = (int(s.config.get_text_config().vocab_size) for s in (teacher, source))
    if theirs != ours:
        raise PareError(
            f"{teacher.id} knows {theirs} tokens and {source.id} {ours}: probabilities cannot be compared. {advice}"
        )


def _scored(
    source: ModelSource,
    dense: Baseline,
    writer: CheckpointWriter,
    evaluations: Sequence[Windows],
    trained: Windows,
    note: Callable[[str], None],
) -> list[ThreeModels]:
    """Each text by the dense, the compressed and the recovered model, as it was written; the record gets its probe."""
    note("scoring the dense, the compressed and the recovered model")
    written, quiet = ModelSource(writer.folder, str(writer.out), device=source.device), lambda done, total: None
    ids = probe_ids(trained.ids)
    *after, probe = walked(written, [*evaluations, Windows(ids, "probe", "", "")], quiet)
    add_probe(writer, ids, probe.nll(written))
    before, compressed = dense.behind(evaluations), score(source, evaluations, quiet)
    return [
        ThreeModels(windows, compare(theirs, ours, dense.source, written), losses)
        for windows, theirs, ours, losses in zip(evaluations, before, after, compressed, strict=True)
    ]


@dataclass(frozen=True)
class _Inputs:
    """What `key_of` asks of a job."""

    source: ModelSource
    recipe: Recipe
    format: Format


def _key(source: ModelSource, teacher: ModelSource, recipe: Recipe, texts: Sequence[Windows]) -> str:
    """A hash of all that a recovery depends on."""
    keys = [key_of(_Inputs(part, recipe, format_of(source)), texts, versions()) for part in (source, teacher)]
    return hashlib.sha256(" ".join(keys).encode()).hexdigest()


def _record(source: ModelSource, teacher: ModelSource, steps: Steps, tokenizer: Any) -> Mapping[str, Any]:
    """paredown.json: what the compression wrote there, and how it was recovered."""
    record = carried_record(source, tokenizer)
    own = {
        "recipe": steps.recipe.to_dict(),
        "teacher": teacher.provenance(),
        "tokens": sum(step["tokens"] for step in steps.done),
    }
    return {**record, "recovery": [*record.get("recovery", []), own], "versions": versions()}
