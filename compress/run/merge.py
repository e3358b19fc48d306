"""Merge a LoRA adapter of peft into a compressed checkpoint, which keeps its form: masks, N:M patterns, ranks and kinds."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import RECORD, CheckpointWriter
from paredown.compress.machine import peak_memory
from paredown.compress.progress import Counted, ignore, logger
from paredown.compress.run import once
from paredown.compress.run.merge_layers import Merging
from paredown.compress.run.open import open_source
from paredown.compress.run.record import write_report
from paredown.compress.run.recorded import read_record
from paredown.compress.run.recover_report import carried_report
from paredown.compress.run.recover_write import add_probe, carried_record, write_changed
from paredown.compress.run.scoring import walked
from paredown.compress.serving.adapter_config import read_config
from paredown.compress.serving.adapter_files import AdapterFiles
from paredown.compress.text.windows import Windows
from paredown.evaluation.schema import AdapterMerge, Report, check_report
from paredown.evaluation.surroundings import versions

NOT_SCORED = "nothing was scored after the adapter was merged. Type: paredown eval OUT --against MODEL"
STALE = ("samples", "seeds")  # of a report: what the checkpoint without the adapter did


def merge(
    checkpoint: str | Path,
    adapter: str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    note: Callable[[str], None] = logger.info,
    doing: Callable[[str], None] = ignore,
    command: str | None = None,
) -> Report:
    """Add the updates of a LoRA adapter to the weights of `checkpoint`, into the folder `out`, and return the report.

    checkpoint: a folder that `compress` or `recover` wrote, or any other model; adapter: a folder that peft's
    `save_pretrained` wrote. A weight of which a mask keeps some numbers, packed or dense with zeros, takes the update there
    alone; a factored one becomes the best approximation of weight + update of the rank that it has, in the plain Frobenius
    norm; all others take it whole. One block is in memory at a time. The report, also in `out/report.json`, is that of the
    compression without its scores, and says under `adapters` how much of the update was left out. What was written is
    verified. Raises PareError for an adapter of another model; `out` then does not exist.
    """
    began = perf_counter()
    files = AdapterFiles(read_config(Path(adapter)))
    source = open_source(str(checkpoint), device=device)
    tokenizer = load_tokenizer(source.folder)
    work = Merging(source, files)
    work.check()

    def shown(done: int, total: int) -> None:
        doing(Counted(f"merging: block {done} of {total}", "merging", done, total))

    with CheckpointWriter(Path(out)) as writer:
        record = {**carried_record(source, tokenizer), "versions": versions()}
        told = {"adapter": str(adapter), "sha256": files.sha256(), "base": files.config.base}
        record["adapters"] = [*record.get("adapters", []), told]
        write_changed(writer, source, lambda block: work.of_block(block, shown), work.outside(), record)
        doing("")
        _probe(source, writer)
        merged = cast(AdapterMerge, {**told, "parts": work.parts()})
        report = _report(source, merged, writer.bytes, perf_counter() - began, command)
        write_report(writer, report, source.folder, note)
        once.commit_verified(writer, note)
    return report


@torch.no_grad()
def _probe(source: ModelSource, writer: CheckpointWriter) -> None:
    """Record the losses of the tokens that `verify` reads, where the checkpoint has some."""
    known = read_record(source.folder).get("probe") if (source.folder / RECORD).exists() else None
    if known:
        written, ids = ModelSource(writer.folder, str(writer.out), device=source.device), torch.tensor([known["ids"]])
        (stream,) = walked(written, [Windows(ids, "probe", "", "")], lambda done, total: None)
        add_probe(writer, ids, stream.nll(written))


def _report(source: ModelSource, merged: AdapterMerge, bytes_after: int, seconds: float, command: str | None) -> Report:
    """The report of the checkpoint without its scores, which are no longer true, and with what was merged into it."""
    base = {key: value for key, value in carried_report(source, source).items() if key not in STALE}
    report: dict[str, Any] = {
        **base,
        "evaluation": [],
        "tasks": {},
        "bytes": {**base["bytes"], "after": bytes_after},
        "seconds": {**base["seconds"], "total": round(base["seconds"]["total"] + seconds, 3)},
        "peak_memory_bytes": peak_memory(),
        "versions": versions(),
        "command": command,
        "warnings": list(dict.fromkeys([*base.get("warnings", []), NOT_SCORED])),
        "adapters": [*base.get("adapters", []), merged],
    }
    check_report(report)
    return cast(Report, report)
