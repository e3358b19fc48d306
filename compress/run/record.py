"""What a run writes beside the weights: report.json, report.html, the card, paredown.json and config.json."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.companions import file_sha256, write_companions
from paredown.compress.checkpoint.config_file import write_config_file
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.remote_code import CODE, add_code
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.job import Format
from paredown.compress.machine import peak_memory
from paredown.compress.model.blocks import blocks
from paredown.compress.model.reshape import Reshaped
from paredown.compress.recipe import CalibrationSpec
from paredown.compress.run.plan import Plan
from paredown.compress.run.recorded import read_record
from paredown.compress.run.result import Result
from paredown.compress.run.tokens import probe_tokens
from paredown.compress.run.walk import Task
from paredown.compress.run.write import names_in_files
from paredown.compress.serving.engines import engines
from paredown.compress.shape_job import ShapeJob
from paredown.compress.storage.spec import Spec
from paredown.compress.text.corpora import NAMED, SELECTOR
from paredown.compress.text.windows import Windows
from paredown.evaluation.card import CARD, carried_over, model_card
from paredown.evaluation.html.page import PAGE, report_page
from paredown.evaluation.schema import SCHEMA, Report, check_report
from paredown.evaluation.surroundings import surroundings, versions
from paredown.evaluation.tables import bytes_by_part

RECORDED = ("kept", "sparsity", "kind", "rank", "relative_error")  # of each layer, in paredown.json


def make_report(
    job: Task,
    plan: Plan,
    result: Result,
    windows: Windows,
    tasks: Mapping[str, Any],
    written: Mapping[str, int],
    *,
    command: str | None = None,
    warnings: Sequence[str] = (),
    memory_base: int = 0,
) -> Report:
    """report.json, schema version SCHEMA.

    windows: of the calibration. `written` is the bytes of each tensor that was written. `memory_base` is how many bytes the
    process held before the run; `command` is what was typed, if anything was.
    """
    source = job.source
    parts = bytes_by_part({name: entry.bytes for name, entry in source.files.entries.items()}, written)
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
        "calibration": _calibration(windows.provenance(), _paths(job.recipe.calibration)),
        "evaluation": result.evaluation,
        "tasks": tasks,
        "parameters": {"total": plan.parameters, "targeted": result.targeted, "kept": result.numbers},
        "bytes": {"before": plan.bytes_before, "after": sum(written.values())},
        "layers": result.layers,
        "left_dense": plan.left_out,
        "unsupported": plan.unsupported,
        "seconds": {key: round(value, 3) for key, value in result.seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "fallbacks": result.fallbacks,
        "versions": versions(),
        "format": job.format,
        "engines": _engines(job, result),
        "command": command,
        "warnings": list(warnings),
        "memory_base_bytes": memory_base,
        "dtype": str(source.dtype).removeprefix("torch."),
        "parts": parts,
        **({"reconstruction": result.reconstruction} if result.reconstruction else {}),
        **{key: value for key, value in surroundings(source.device).items() if key != "versions"},
        **structure_of(job, result),
    }
    check_report(report)
    return cast(Report, report)


def _engines(job: Task, result: Result) -> dict[str, str]:
    """What runs the checkpoint, and how it takes it. One that needs nothing of ours is a dense one."""
    small, specs = result.smaller, [*job.source.modules.values(), *result.specs.values()]
    uneven = bool(small.shapes if small else job.source.shapes)
    return dict(engines("packed" if specs else "dense", specs, uneven))


def structure_of(job: Task, result: Result) -> dict[str, Any]:
    """What was removed, under the key of the report; nothing where the model has its shape still."""
    if not isinstance(job, ShapeJob) or result.smaller is None:
        return {}
    small, groups = result.smaller, job.all_groups
    before = {small.renamed(name) for name in job.source.shapes.absent}
    own = {
        "sizes": {g.name: [g.units, result.sizes[g.name]] for g in groups if g.name in result.sizes},
        "absent": [name for name in small.shapes.absent if name not in before],
        "merged": [list(group) for group in result.merged],
    }
    return {
        "structure": {
            "blocks": list(small.kept),
            "blocks_before": len(job.blocks),
            "units": {key: list(counts) for key, counts in job.counts.items()},
            **{key: value for key, value in own.items() if value},
        }
    }


def _names(source: ModelSource, small: Reshaped | None) -> dict[str, Any]:
    """What an export needs to know of tensors that are written under the names of the model class."""
    if small is None:
        verbatim = source.verbatim
    elif small.shapes:
        verbatim = small.config.quantization_config["verbatim"]
    else:
        return {"verbatim": []}
    if small is not None and len(small.kept) < len(blocks(source)):  # the numbers in names are others now
        return {"verbatim": verbatim}
    if source.packed and (source.folder / RECORD).exists():
        known = read_record(source.folder)
        return {"verbatim": verbatim, **{key: known[key] for key in ("renamed", "converted") if key in known}}
    return {"verbatim": verbatim, **names_in_files(source)}


def _calibration(text: dict[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
    """A calibration text, its parts and the domain's beside it, under the names of the report; `paths` as of `_paths`."""
    nested = {"domain": _calibration(text["domain"], paths)} if "domain" in text else {}
    parts = {"sources": [_calibration(part, paths) for part in text["sources"]]} if "sources" in text else {}
    name = text.pop("corpus")
    return {"source": paths.get(name, name), **text, **nested, **parts}


def _paths(spec: CalibrationSpec) -> dict[str, str]:
    """Absolute paths of the calibration texts that are files or folders, by the last part, which a corpus is named by."""
    found: dict[str, set[str]] = {}
    for name in (*(text.source for text in spec.texts), spec.domain):
        if name and name != "stdlib" and name not in NAMED:
            path = Path(name if Path(name).exists() else SELECTOR.split(name)[0]).expanduser()
            if path.exists():
                found.setdefault(path.name, set()).add(str(path.resolve()))
    return {name: paths.pop() for name, paths in found.items() if len(paths) == 1}


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
            **_names(source, small),
            **structure_of(job, result),
            "layers": {layer["name"]: {key: layer[key] for key in RECORDED if key in layer} for layer in result.layers},
            "probe": result.probe,
            "tokenizer": probe_tokens(load_tokenizer(source.folder) if tokenizer is None else tokenizer),
            "versions": versions(),
        }
        specs = {**source.modules, **result.specs}  # what was packed before stays so
        finish(writer, source, job.format, specs, record, small.config if small else None)


def write_report(writer: CheckpointWriter, report: Report, model: Path, note: Callable[[str], None]) -> None:
    """Write report.json, the card and report.html. `model` is the folder of the model, whose card says the licence."""
    carried, damaged = carried_over(model)
    report["warnings"] = [*report.get("warnings", []), *damaged]
    writer.write_json("report.json", report)
    writer.write_text(CARD, model_card(report, carried))
    try:
        page = report_page(report)
    except Exception as fault:  # whatever a library for pictures raises: hours of work are not lost for a picture
        note(f"{PAGE} was not written ({type(fault).__name__}: {fault}): try python -m paredown.evaluation.html OUT")
    else:
        writer.write_text(PAGE, page)


def finish(
    writer: CheckpointWriter,
    source: ModelSource,
    format: Format,
    specs: Mapping[str, Spec],
    record: Mapping[str, Any],
    config: Any = None,
) -> None:
    """Write the files beside the tensors; `record` goes into paredown.json, with the digests of all others.

    `config` of the dense model, where it is not the source's. Code that loads packed weights goes along if the writer was
    told so, or if it lies beside the source.
    """
    names = write_companions(source.folder, writer.folder)
    write_config(writer, source, format, specs, config)
    if writer.remote_code or (source.folder / CODE).is_file():
        names += add_code(writer.folder)
    files = {name: file_sha256(writer.folder / name) for name in sorted(["config.json", *names])}
    writer.finish({**record, "files": files})


def write_config(
    writer: CheckpointWriter, source: ModelSource, format: Format, specs: Mapping[str, Spec], config: Any = None
) -> None:
    """Write config.json: with a model type of ours if some weights are packed or have sizes of their own, else the family's.

    `config`, if given, is written instead of the source's.
    """
    if config is None and (specs or source.shapes):
        config = transformers_plugin.packed_config(source.config, specs, source.verbatim, source.shapes)
    elif config is None:
        config = transformers_plugin.dense_config(source.config)
    config.dtype = source.dtype
    write_config_file(config, writer.folder, source.folder / "config.json", type(source.model).__name__)
