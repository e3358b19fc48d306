"""The way through the house: read a block, observe it, edit it, let the compressed block feed the next, write it, drop it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from paredown.compress import kinds
from paredown.compress.blocks import Block, View, blocks, known, select
from paredown.compress.calibration import Windows
from paredown.compress.edits import Masked, storage_kind
from paredown.compress.errors import PareError
from paredown.compress.machine import peak_memory, return_freed_memory
from paredown.compress.methods import Method
from paredown.compress.observe import Observer
from paredown.compress.perplexity import paired_delta, perplexity
from paredown.compress.recipe import Recipe
from paredown.compress.source import ModelSource
from paredown.compress.statistics import InputStats
from paredown.compress.stream import Stream, name_of, start
from paredown.compress.writer import CheckpointWriter

Format = Literal["packed", "dense"]
PROBE_TOKENS = 128


@dataclass(frozen=True)
class BlockDone:
    """What a progress display is told after each block."""

    index: int
    total: int
    name: str
    kept: float  # of the targeted weights
    relative_error: float  # mean over the block's layers
    seconds: float
    peak_memory: int  # bytes, of the process so far


@dataclass
class Result:
    """What the loop measured; the report is made from it."""

    layers: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    modules: dict[str, Any] = field(default_factory=dict)  # specs of packed weights, for config.json
    evaluation: list[dict[str, Any]] = field(default_factory=list)
    targeted: int = 0
    kept: int = 0
    probe: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + perf_counter() - began


@dataclass
class Run:
    """One compression: what it works on and with."""

    source: ModelSource
    recipe: Recipe
    method: Method
    calibration: Windows
    evaluations: list[Windows]
    writer: CheckpointWriter
    format: Format = "packed"
    progress: Callable[[BlockDone], None] = lambda done: None

    @torch.no_grad()
    def run(self) -> Result:
        source, result = self.source, Result()
        if not known(source):
            result.fallbacks.append(f"family {source.family!r} is not one we test: blocks were found by structure")
        all_blocks = blocks(source)
        chosen = targeted(source, self.recipe)
        with result.timed("calibration"):
            stream = start(source, self.calibration.ids)
        with result.timed("evaluation"):
            before = [start(source, windows.ids) for windows in self.evaluations]
            after = [s.copy() for s in before]
            probe = start(source, self.calibration.ids[:1, :PROBE_TOKENS])
        for block in all_blocks:
            began, last = perf_counter(), block is all_blocks[-1]
            with result.timed("read"):
                source.materialise(block.prefix, block.names)
            with result.timed("evaluation"):
                advance(before, block)
            views = [v for v in block.views() if v.name in chosen]
            with result.timed("calibration"):
                stats = observe(stream, block, views, self.method.needs)
            with result.timed("compress"):
                edits = self._edit(views, stats, result)
            with result.timed("calibration"):
                if not last:
                    stream.advance(block)
            with result.timed("evaluation"):
                advance([*after, probe], block)
            with result.timed("write"):
                write_block(self.writer, source, block, edits, self.format, result)
            source.release(block.prefix, block.names)
            del views, edits, stats
            return_freed_memory()
            self.progress(_done(block, len(all_blocks), result, perf_counter() - began))
        with result.timed("evaluation"):
            result.evaluation = [
                evaluation_entry(w, b.nll(source), a.nll(source))
                for w, b, a in zip(self.evaluations, before, after, strict=True)
            ]
            ids = self.calibration.ids[:1, :PROBE_TOKENS]
            result.probe = {"ids": ids[0].tolist(), "nll": probe.nll(source)[0].tolist()}
        with result.timed("write"):
            write_rest(self.writer, source, all_blocks, self.format)
        result.seconds["forward"] = sum(s.seconds for s in [stream, *before, *after, probe])
        return result

    def _edit(self, views: list[View], stats: dict[str, InputStats], result: Result) -> dict[str, Masked]:
        """Compress each view and put the edit in place. A layer that no token reached follows the recipe's policy."""
        edits: dict[str, Masked] = {}
        for view in views:
            began, weight = perf_counter(), view.weight
            seen = stats.get(view.name)
            if seen is None and view.expert is None:
                result.fallbacks.append(f"{view.name}: never called as a layer, so it was left as it is")
                continue
            if seen is None and self.recipe.idle == "dense":
                result.fallbacks.append(
                    f"{view.name}: no calibration token reached this expert; left dense (idle: dense)"
                )
                continue
            if seen is None:
                result.fallbacks.append(f"{view.name}: no calibration token reached this expert; scored without data")
                seen = InputStats.uniform(view.shape[1], self.method.needs, self.source.device)
            try:
                edit = self.method.compress(weight, seen)
            except PareError as fault:
                raise PareError(f"{view.name}: {fault}") from fault
            if edit.fallback:
                result.fallbacks.append(f"{view.name}: {edit.fallback}")
            result.layers.append(
                {
                    "name": view.name,
                    "method": self.recipe.method,
                    "kept": edit.kept / weight.numel(),
                    "relative_error": edit.relative_error(weight, seen),
                    "damping": edit.damping,
                    "seconds": perf_counter() - began,
                }
            )
            result.targeted += weight.numel()
            result.kept += edit.kept
            view.assign(edit.dense())
            edits[view.name] = edit
        return edits


def targeted(source: ModelSource, recipe: Recipe) -> set[str]:
    """Names of the views that the recipe's patterns choose. Raises PareError for a pattern that matches nothing."""
    views = [view for block in blocks(source) for view in block.views()]
    head = name_of(source.model, "get_output_embeddings")
    return {v.name for v in select(views, [*recipe.targets.include], [*recipe.targets.skip], head)[0]}


def observe(stream: Stream, block: Block, views: list[View], needs: frozenset[str]) -> dict[str, InputStats]:
    """Statistics of each view's input, by view name; views that no token reached are missing."""
    observer = Observer(views, needs, stream.device)
    with observer:
        for _ in stream.outputs(block):
            observer.next_batch()
    stream.seconds -= observer.seconds  # what is collected on the way is not the model's own forward pass
    return observer.stats


def advance(streams: list[Stream], block: Block) -> None:
    for stream in streams:
        stream.advance(block)


@torch.no_grad()
def score(source: ModelSource, evaluations: list[Windows], progress: Callable[[int, int], None]) -> list[Tensor]:
    """Loss per token of each set of windows `(windows, length - 1)`, with one block in memory at a time."""
    streams = [start(source, windows.ids) for windows in evaluations]
    all_blocks = blocks(source)
    for block in all_blocks:
        source.materialise(block.prefix, block.names)
        advance(streams, block)
        source.release(block.prefix, block.names)
        progress(block.index + 1, len(all_blocks))
    return [stream.nll(source) for stream in streams]


def evaluation_entry(windows: Windows, before: Tensor, after: Tensor) -> dict[str, Any]:
    """One element of the report's `evaluation`: protocol, both figures, and their paired difference."""
    return {
        **windows.provenance(),
        "before": perplexity(before),
        "after": perplexity(after),
        "paired_delta": paired_delta(before, after),
    }


def write_block(
    writer: CheckpointWriter,
    source: ModelSource,
    block: Block,
    edits: dict[str, Masked],
    format: Format,
    result: Result,
) -> None:
    """Hand the block's tensors to the writer: edited ones packed or dense, all others as they were stored."""
    owners: dict[str, list[View]] = {}  # a fused parameter of experts is written as one
    for view in block.views():
        owners.setdefault(view.owner, []).append(view)
    edited = {owner: views for owner, views in owners.items() if any(v.name in edits for v in views)}
    names = {owner: f"{owner}.weight" if views[0].expert is None else owner for owner, views in edited.items()}
    untouched = [block.prefix + n for n in block.names if block.prefix + n not in names.values()]
    dense = dict(source.read(untouched))
    for owner, views in edited.items():
        keep, sparsity = _joint_mask(views, edits)
        kept = int(torch.count_nonzero(keep))
        weight = views[0].weight if views[0].expert is None else getattr(views[0].module, views[0].parameter)
        kind = storage_kind(tuple(weight.shape), kept, sparsity, weight.element_size())
        if format == "dense" or kind == "dense":
            dense[names[owner]] = views[0].raw if views[0].expert is None else weight
            continue
        result.modules[owner] = {
            "kind": kind, "layout": views[0].layout, "shape": list(weight.shape), "kept": kept
        }  # fmt: skip
        for part, tensor in kinds.pack(kind, weight, keep).items():
            writer.add(f"{owner}.{part}", tensor, kind=kind)
    _add_dense(writer, source, dense, format)
    writer.end_block()


def write_rest(writer: CheckpointWriter, source: ModelSource, all_blocks: list[Block], format: Format) -> None:
    """Embeddings, final norm, head, and tensors that the model class does not know: as they were stored."""
    inside = tuple(block.prefix for block in all_blocks)
    for name in source.parameters:
        if not name.startswith(inside):
            _add_dense(writer, source, source.read([name]), format)
            writer.end_block()
    for key, tensor in source.files.read(source.verbatim).items():
        writer.add(key, tensor, kind="verbatim")


def _add_dense(writer: CheckpointWriter, source: ModelSource, weights: dict[str, Tensor], format: Format) -> None:
    named = source.checkpoint_names(weights) if format == "dense" else weights
    for name, tensor in named.items():
        writer.add(name, tensor, kind="dense")


def _joint_mask(views: list[View], edits: dict[str, Masked]) -> tuple[Tensor, Any]:
    """The mask of a weight, or of all experts of a fused one; experts that stay dense keep everything."""
    found = [edits[v.name].keep if v.name in edits else torch.ones_like(v.weight, dtype=torch.bool) for v in views]
    patterns = {edits[v.name].sparsity if v.name in edits else None for v in views}
    sparsity = patterns.pop() if len(patterns) == 1 else 0.0
    return (found[0] if views[0].expert is None else torch.stack(found)), sparsity  # ([experts,] out, in)


def _done(block: Block, total: int, result: Result, seconds: float) -> BlockDone:
    mine = [layer for layer in result.layers if layer["name"].startswith(block.prefix)]
    kept, error = (sum(layer[key] for layer in mine) / max(len(mine), 1) for key in ("kept", "relative_error"))
    name = block.prefix.rstrip(".")
    return BlockDone(block.index, total, name, kept if mine else 1.0, error, seconds, peak_memory()["host"])
