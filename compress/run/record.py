"""What a run writes beside the weights: report.json, paredown.json and config.json."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.companions import file_sha256, write_companions
from paredown.compress.checkpoint.config_file import write_config_file
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import Format
from paredown.compress.machine import peak_memory
from paredown.compress.run.plan import Plan
from paredown.compress.run.result import Result
from paredown.compress.run.tokens import probe_tokens
from paredown.compress.run.walk import Task
from paredown.compress.run.write import names_in_files
from paredown.compress.shape_job import ShapeJob
from paredown.compress.storage.spec import Spec
from paredown.compress.text.windows import Windows
from paredown.evaluation.schema import SCHEMA, Report, check_report
from paredown.evaluation.surroundings import versions

RECORDED = ("kept", "sparsity", "kind", "rank", "relative_error")  # of each layer, in paredown.json


def make_report(
    job: Task,
    plan: Plan,
    result: Result,
    windows: Windows,
    tasks: Mapping[str, Any],
    bytes_after: int,
    *,
    command: str | None = None,
    warnings: Sequence[str] = (),
    memory_base: int = 0,
) -> Report:
    """report.json, schema version SCHEMA.

    windows: of the calibration. `memory_base` is how many bytes the process held before the run; `command` is what was
    typed, if anything was.
    """
    source = job.source
    report = {
        "schema": SCHEMA,
        "model": {
            "id": source.id,
            "revision": source.revision,
            "family": source.family,
            "parameters": plan.parameters,
            "tokenizer_sha256": source.tokenizer_sha256(),
        },
        "recipe": job.recipe.to_dict(),
        "calibration": _calibration(windows.provenance()),
        "evaluation": result.evaluation,
        "tasks": tasks,
        "parameters": {"total": plan.parameters, "targeted": result.targeted, "kept": result.numbers},
        "bytes": {"before": plan.bytes_before, "after": bytes_after},
        "layers": result.layers,
        "left_dense": plan.left_out,
        "unsupported": plan.unsupported,
        "seconds": {key: round(value, 3) for key, value in result.seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "fallbacks": result.fallbacks,
        "versions": versions(),
        "format": job.format,
        "command": command,
        "warnings": list(warnings),
        "memory_base_bytes": memory_base,
        **structure_of(job, result),
    }
    check_report(report)
    return cast(Report, report)


def structure_of(job: Task, result: Result) -> dict[str, Any]:
    """What was removed, under the key of the report; nothing where the model has its shape still."""
    if not isinstance(job, ShapeJob) or result.smaller is None:
        return {}
    units = {group.config_key: [group.units, job.units[group.config_key]] for group in job.all_groups}
    return {"structure": {"blocks": list(result.smaller.kept), "blocks_before": len(job.blocks), "units": units}}


def _calibration(text: dict[str, Any]) -> dict[str, Any]:
    """A calibration text, and the domain's beside it, under the names of the report."""
    nested = {"domain": _calibration(text["domain"])} if "domain" in text else {}
    return {"source": text.pop("corpus"), **text, **nested}


def write_record(writer: CheckpointWriter, job: Task, result: Result, windows: Windows, tokenizer: Any = None) -> None:
    """Write what makes the tensors a checkpoint: paredown.json, config.json, and the model's tokenizer and other files.

    `tokenizer`: the model's; None reads it from the model's folder.
    """
    source, small = job.source, result.smaller
    with result.timed("write"):
        record = {
            "recipe": job.recipe.to_dict(),
            "model": source.provenance(),
            "calibration": windows.provenance(),
            "format": job.format,
            "tied": source.tied,
            "verbatim": source.verbatim if small is None else [],
            **(names_in_files(source) if small is None else {}),
            **structure_of(job, result),
            "layers": {layer["name"]: {key: layer[key] for key in RECORDED if key in layer} for layer in result.layers},
            "probe": result.probe,
            "tokenizer": probe_tokens(load_tokenizer(source.folder) if tokenizer is None else tokenizer),
            "versions": versions(),
        }
        finish(writer, source, job.format, result.specs, record, small.config if small else None)


def finish(
    writer: CheckpointWriter,
    source: ModelSource,
    format: Format,
    specs: Mapping[str, Spec],
    record: Mapping[str, Any],
    config: Any = None,
) -> None:
    """Write the files beside the tensors; `record` goes into paredown.json, with the digests of all others.

    `config` of the dense model, where it is not the source's.
    """
    names = write_companions(source.folder, writer.folder)
    write_config(writer, source, format, specs, config)
    files = {name: file_sha256(writer.folder / name) for name in sorted(["config.json", *names])}
    writer.finish({**record, "files": files})


def write_config(
    writer: CheckpointWriter, source: ModelSource, format: Format, specs: Mapping[str, Spec], config: Any = None
) -> None:
    """Write config.json: with a model type of ours if some weights are packed, else with the family's own.

    `config`, if given, is written instead of the source's.
    """
    if config is None and specs:
        config = transformers_plugin.packed_config(source.config, specs, source.verbatim)
    elif config is None:
        config = transformers_plugin.dense_config(source.config) if source.modules else source.config
    config.dtype = source.dtype
    write_config_file(config, writer.folder, source.folder / "config.json", type(source.model).__name__)
