"""report.json of a recovered checkpoint: the report of its compression, with three models' scores and what was trained."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.machine import peak_memory
from paredown.compress.numerics.perplexity import paired_delta, perplexity
from paredown.compress.recipe import Recipe
from paredown.compress.run.once import How
from paredown.compress.run.recover_write import format_of
from paredown.compress.run.scoring import Compared, evaluation_entry
from paredown.compress.text.windows import Windows
from paredown.evaluation.schema import SCHEMA, Report, Sample, check_report
from paredown.evaluation.surroundings import versions


@dataclass(frozen=True)
class ThreeModels:
    """One text by three models, losses in nats (windows, length - 1)."""

    windows: Windows
    ends: Compared  # the dense and the recovered model
    compressed: Tensor  # losses of the compressed model

    def entry(self) -> dict[str, Any]:
        """One element of the report's `evaluation`."""
        before, after = self.windows.of_text(self.compressed), self.windows.of_text(self.ends.after)
        return {
            **evaluation_entry(self.windows, self.ends),
            "compressed": perplexity(before),
            "recovered_delta": paired_delta(before, after),
        }


def recovered_report(
    source: ModelSource,
    dense: ModelSource,
    recipe: Recipe,
    steps: Sequence[Mapping[str, Any]],
    models: Sequence[ThreeModels],
    answers: tuple[dict[str, Any], list[Sample], list[str]],
    warnings: Sequence[str],
    bytes_after: int,
    seconds: float,
    how: How,
) -> Report:
    """The report of the compression, if there is one, with the recovery's `steps` and scores.

    `answers`: scores of tasks by the dense and the recovered model, samples of both, and remarks on them.
    Its recipe is that of the compression, or `recipe` where that did both.
    """
    base = carried_report(source, dense)
    if recipe.compresses:  # one recipe for all that was done
        base["recipe"] = recipe.to_dict()
    tasks, samples, remarks = answers
    spent = {**base["seconds"], "recover": round(base["seconds"].get("recover", 0.0) + seconds, 3)}
    report: dict[str, Any] = {
        **base,
        "evaluation": [text.entry() for text in models],
        "tasks": tasks,
        "bytes": {**base["bytes"], "after": bytes_after},
        "seconds": {**spent, "total": round(spent["total"] + seconds, 3)},
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "command": how.command,
        "warnings": list(dict.fromkeys([*base.get("warnings", []), *warnings, *remarks])),
        "fallbacks": [*base["fallbacks"], *(remark for step in steps for remark in step["remarks"])],
        "recovery": [*base.get("recovery", []), *({"recipe": recipe.to_dict(), **step} for step in steps)],
    }
    report.pop("samples", None)  # they were the compressed model's
    if samples:
        report["samples"] = samples
    check_report(report)
    return cast(Report, report)


def carried_report(source: ModelSource, dense: ModelSource) -> dict[str, Any]:
    """The report in the checkpoint's folder, or as much of one as can be said of a checkpoint without it."""
    path = source.folder / "report.json"
    if path.exists():
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        check_report(report)
        return report
    parameters = sum(t.numel() for t in dense.parameters.values())
    return {
        "schema": SCHEMA,
        "model": {
            "id": dense.id,
            "revision": dense.revision,
            "family": dense.family,
            "parameters": parameters,
            "tokenizer_sha256": dense.tokenizer_sha256(),
        },
        "recipe": {},
        "calibration": None,
        "parameters": {"total": parameters, "targeted": 0, "kept": 0},
        "bytes": {"before": sum(entry.bytes for entry in dense.files.entries.values())},
        "layers": [],
        "seconds": dict.fromkeys(("calibration", "compress", "evaluation", "write", "total"), 0.0),
        "fallbacks": [],
        "format": format_of(source),
    }
