"""The way through the house: read a block, observe it, edit it, let the compressed block feed the next, write it, drop it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import for_format, targeted
from paredown.compress.machine import peak_memory, return_freed_memory
from paredown.compress.methods import Method
from paredown.compress.model.blocks import Block, blocks, known
from paredown.compress.model.stream import Stream, start
from paredown.compress.numerics.moments import PAIRED_NEEDS, RESIDUAL_NEEDS
from paredown.compress.numerics.perplexity import paired_delta, perplexity
from paredown.compress.recipe import Recipe
from paredown.compress.recovery.reconstruct import reconstruct
from paredown.compress.run.editor import Editor
from paredown.compress.run.journal import Journal, State
from paredown.compress.run.write import Format, write_block, write_rest
from paredown.compress.survey.collect import Writers, groups, observe, observe_paired, observe_writer, shared_copy
from paredown.compress.survey.survey import Survey, survey
from paredown.compress.text.windows import Windows

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
    note: Callable[[str], None] = lambda text: None
    journal: Journal | None = None
    doing: Callable[[str], None] = lambda text: None  # what takes its time now; nothing once the walk is over

    @torch.no_grad()
    def run(self) -> Result:
        source, result = self.source, Result()
        if not known(source):
            result.fallbacks.append(f"family {source.family!r} is not one we test: blocks were found by structure")
        all_blocks = blocks(source)
        with self.writer.scratch() as scratch:
            left = self.journal.left if self.journal else None
            editor = self._restored(scratch, result, left) if left else self._editor(scratch, result)
            self._walk(all_blocks, editor, result, left)
        return result

    def _editor(self, scratch: Path, result: Result) -> Editor:
        source, recipe = self.source, self.recipe
        self.method = for_format(source, recipe, self.method, self.format)
        with result.timed("survey"):
            chosen = targeted(source, recipe)
            found = survey(source, self.method, recipe.allocation, self.calibration.ids, chosen, scratch, self.note)
        remarks = [getattr(self.method, "remark", None), self._too_little_text(chosen)]
        result.fallbacks += [said for said in remarks if said]
        return self._editor_of(found, result)

    def _restored(self, scratch: Path, result: Result, left: State) -> Editor:
        """As a stopped run had it."""
        self.note(f"going on after {left.facts['blocks']} blocks")
        self.method = for_format(self.source, self.recipe, self.method, self.format)
        for name, value in left.facts["result"].items():
            setattr(result, name, value)
        editor = self._editor_of(Survey.restored(scratch, left.facts["survey"], left.part("survey")), result)
        editor.targeted, editor.kept = result.targeted, result.kept
        return editor

    def _editor_of(self, found: Survey, result: Result) -> Editor:
        told = (result.layers, result.fallbacks)
        return Editor(self.recipe, self.method, found, self.source.device, self.format, *told, doing=self.doing)

    def _too_little_text(self, chosen: set[str]) -> str | None:
        """A warning where the widest layer's Gram matrix must be singular."""
        tokens = self.calibration.ids.numel()
        sizes = {v.name: v.shape[1] for block in blocks(self.source) for v in block.views() if v.name in chosen}
        widest = max(sizes, key=sizes.__getitem__, default="")
        if "gram" not in self.method.needs or tokens >= sizes.get(widest, 0):
            return None
        return (
            f"{tokens} calibration tokens are fewer than the {sizes[widest]} inputs of {widest} and cannot tell them apart: "
            "raise calibration.sequences or calibration.length"
        )

    def _walk(self, all_blocks: list[Block], editor: Editor, result: Result, left: State | None) -> None:
        source = self.source
        with result.timed("calibration"):
            stream = start(source, self.calibration.ids)
            # the dense model's inputs beside the compressed one's, where a method or the reconstruction aims at them
            dense = stream.copy() if "cross" in self.method.needs or self.recipe.reconstruct else None
        with result.timed("evaluation"):
            before = [start(source, windows.ids) for windows in self.evaluations]
            after = [s.copy() for s in before]
            probe = start(source, self.calibration.ids[:1, :PROBE_TOKENS])
        streams = _named(
            calibration=[stream], dense=[dense] if dense else [], before=before, after=after, probe=[probe]
        )
        if left:
            left.restore(streams)
        for block in all_blocks[left.facts["blocks"] if left else 0 :]:
            self._save(block.index, len(all_blocks), streams, editor, result)
            began, last = perf_counter(), block is all_blocks[-1]
            self.doing(f"reading {_name(block)} and running it")
            with result.timed("read"):
                source.materialise(block.prefix, block.names)
            with result.timed("evaluation"):
                advance(before, block)
            self._compress(block, stream, dense, editor, result)
            self.doing(f"running {_name(block)} as compressed, and writing it")
            with result.timed("calibration"):
                if not last:
                    stream.advance(block)
            with result.timed("evaluation"):
                advance([*after, probe], block)
            with result.timed("write"):
                write_block(self.writer, source, block, editor.written(block), self.format, result.modules)
            editor.restore()
            source.release(block.prefix, block.names)
            return_freed_memory()
            self.progress(_done(block, len(all_blocks), result, perf_counter() - began))
        self._save(len(all_blocks), len(all_blocks), streams, editor, result)
        self.doing("")
        result.targeted, result.kept = editor.targeted, editor.kept
        with result.timed("evaluation"):
            result.evaluation = [
                evaluation_entry(w, b.nll(source), a.nll(source))
                for w, b, a in zip(self.evaluations, before, after, strict=True)
            ]
            ids = self.calibration.ids[:1, :PROBE_TOKENS]
            result.probe = {"ids": ids[0].tolist(), "nll": probe.nll(source)[0].tolist()}
        with result.timed("write"):
            write_rest(self.writer, source, all_blocks, self.format)
        result.seconds["forward"] = sum(s.seconds for s in streams.values())

    def _save(self, done: int, of: int, streams: dict[str, Stream], editor: Editor, result: Result) -> None:
        """Save what is left of the blocks so far, where it is time for it."""
        if self.journal is None or not self.journal.due(last=done == of):
            return
        self.doing("saving what is done so far")
        result.targeted, result.kept = editor.targeted, editor.kept
        kept = {name: getattr(result, name) for name in ("layers", "fallbacks", "modules", "targeted", "kept")}
        kept["seconds"] = {**result.seconds, "total": result.seconds.get("total", 0.0) + self.journal.seconds}
        facts, curves = editor.survey.progress()
        curves = {f"survey/{name}": losses for name, losses in curves.items()}
        self.journal.save({"blocks": done, "survey": facts, "result": kept}, streams, curves)

    def _compress(self, block: Block, stream: Stream, dense: Stream | None, editor: Editor, result: Result) -> None:
        """Observe the block and edit its layers: all at once, or group by group where both streams are followed."""
        editor.begin(block)
        views = [v for v in block.views() if v.name in editor.survey.chosen]
        if dense is None or "cross" not in self.method.needs:
            twin = shared_copy(block) if dense else None
            with result.timed("calibration"):
                stats = observe(stream, block, views, self.method.needs & PAIRED_NEEDS)
            with result.timed("compress"):
                editor.edit(block, views, stats)
            del stats  # before the block is tuned
        else:
            twin = shared_copy(block)
            called, needs = groups(stream, block, views), self.method.needs & PAIRED_NEEDS
            writers = Writers.of(stream, block, called) if self.method.needs & RESIDUAL_NEEDS else Writers([])
            for group in called:
                with result.timed("calibration"):
                    if group[0] in writers.views:
                        later = writers.after(group[0])
                        paired = observe_writer(stream, dense, block, twin, group[0], later, needs)
                    else:
                        paired = observe_paired(stream, dense, block, twin, group, needs)
                return_freed_memory()
                with result.timed("compress"):
                    editor.edit(block, group, dict.fromkeys([v.name for v in group], paired) if paired else {})
                del paired  # before the next group's are collected
        if dense is not None and twin is not None:
            came = list(dense.hidden) if self.recipe.reconstruct else []
            with result.timed("calibration"):
                dense.advance(twin)
            if self.recipe.reconstruct and editor.edits:
                with result.timed("reconstruct"):
                    self._reconstruct(block, stream, came, dense, editor)

    def _reconstruct(self, block: Block, stream: Stream, came: list[Tensor], dense: Stream, editor: Editor) -> None:
        assert self.recipe.reconstruct is not None
        seed = self.recipe.calibration.seed
        steps = self.recipe.reconstruct.steps

        def progress(step: int) -> None:
            self.doing(f"tuning {_name(block)}, step {step} of {steps}")

        done = reconstruct(block, stream, came, dense.hidden, editor.edits, self.recipe.reconstruct, seed, progress)
        editor.tuned = True
        self.note(f"reconstructed {_name(block)}: error {done.before:.2e} -> {done.after:.2e}")


def _named(**groups: list[Stream]) -> dict[str, Stream]:
    return {f"{group}-{i}": stream for group, streams in groups.items() for i, stream in enumerate(streams)}


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


def _name(block: Block) -> str:
    return block.prefix.rstrip(".")


def _done(block: Block, total: int, result: Result, seconds: float) -> BlockDone:
    mine = [layer for layer in result.layers if layer["name"].startswith(block.prefix)]
    kept, error = (sum(layer[key] for layer in mine) / max(len(mine), 1) for key in ("kept", "relative_error"))
    return BlockDone(block.index, total, _name(block), kept if mine else 1.0, error, seconds, peak_memory()["host"])
