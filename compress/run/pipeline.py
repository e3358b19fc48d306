"""The walk over the blocks: read one, observe it, edit it, let it feed the next, write it, free it."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from paredown.compress.job import Job
from paredown.compress.machine import return_freed_memory
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.progress import Measured
from paredown.compress.recovery.reconstruct import reconstruct
from paredown.compress.run.editor import EditedBlock, Editor
from paredown.compress.run.journal import State
from paredown.compress.run.result import Result
from paredown.compress.run.streams import Streams, advance
from paredown.compress.run.survey_cache import surveyed
from paredown.compress.run.walk import Walk, summary
from paredown.compress.run.write import write_block, write_rest
from paredown.compress.survey.collect import observe_alone, observe_both, observe_in_turn, shared_copy
from paredown.compress.survey.residual import Kind
from paredown.compress.survey.survey import Survey


@dataclass
class Run(Walk):
    """A walk that edits single weights."""

    job: Job
    residual_layers: dict[Kind, set[str]] = field(default_factory=dict, init=False)  # found so far

    @torch.no_grad()
    def run(self) -> Result:
        """Walk the model from its first block to its last, or from where an interrupted run stopped.

        Raises PareError if a layer cannot be compressed as the recipe asks, or if activations are not finite.
        """
        job, result, state = self.job, Result(), self.journal.state if self.journal else None
        self.remark_on_family(result)
        with self.writer.scratch() as scratch:
            editor = self._editor(scratch, result, state)
            streams = self.start(result, state)
            self._walk(editor, streams, result, state.facts["blocks"] if state else 0)
            with result.timed("evaluation"):
                self.score(streams, result)
        with result.timed("write"):
            write_rest(self.writer, job.source, job.blocks, job.format)
        result.seconds["forward"] = sum(s.seconds for s in streams.named().values())
        return result

    def _editor(self, scratch: Path, result: Result, state: State | None) -> Editor:
        """Survey the dense model and allocate, or take over the survey of an interrupted run."""
        job, ids = self.job, self.job.surveyed_of(self.calibration.surveyed)
        if state:
            self.progress.note(f"going on after {state.facts['blocks']} blocks")
            result.restore(state.facts["result"])
            measured = Survey.restored(scratch, state.facts["survey"], state.part("survey"))
        else:
            with result.timed("survey"):
                measured = surveyed(job, ids, scratch, self.cache, self.progress.note)
            result.fallbacks += [text for text in (job.method.remark, self._too_little_text()) if text]
        views = job.targets_within(measured.angles)
        options = job.allocate(
            views, measured.choices or None, ids.numel(), measured.sensitivities, measured.scores or None
        )
        return Editor(job, measured, options, frozenset(v.name for v in views), self.progress.doing)

    def _too_little_text(self) -> str | None:
        """A warning if the method needs Gram matrices and the widest layer's must be singular."""
        tokens = self.calibration.ids.numel()
        widest = max(self.job.targets, key=lambda view: view.shape[1], default=None)
        if widest is None or Need.GRAM not in self.job.method.needs or tokens >= widest.shape[1]:
            return None
        return (
            f"{tokens} calibration tokens are fewer than the {widest.shape[1]} inputs of {widest.name} and cannot tell them "
            "apart: raise calibration.sequences or calibration.length"
        )

    def _walk(self, editor: Editor, streams: Streams, result: Result, done: int) -> None:
        """Compress all blocks but the first `done`, saving the state between them."""
        total = len(self.job.blocks)
        for block in self.job.blocks[done:]:
            self.save(block.index, total, streams, result, editor.survey.state)
            began = perf_counter()
            self._block(block, editor, streams, result)
            return_freed_memory()
            self.progress.block(summary(block, total, result, perf_counter() - began))
        self.save(total, total, streams, result, editor.survey.state)
        self.progress.doing("")

    def _block(self, block: Block, editor: Editor, streams: Streams, result: Result) -> None:
        """Read a block, compress it, run all streams through it and write it."""
        source, doing, independent = self.job.source, self.progress.doing, self.job.recipe.order == "independent"
        doing(f"reading {block.name} and running it")
        with ExitStack() as stack:
            with result.timed("read"):
                stack.enter_context(source.loaded(block))
            edited = stack.enter_context(editor.editing(block))
            twin = shared_copy(block) if streams.dense or independent else None  # stays dense
            with result.timed("evaluation"):
                advance(streams.before.values(), block)
            tuned = self._compress(edited, twin, editor, streams, result)
            doing(f"running {block.name} as compressed, and writing it")
            with result.timed("calibration"):
                if block.index < len(self.job.blocks) - 1 and not self._moved(block):
                    streams.calibration.advance(twin if twin and independent else block)
            del twin  # with the original weights
            with result.timed("evaluation"):
                advance([*streams.after, streams.probe], block)
            with result.timed("write"):
                change = edited.change(tuned)
                write_block(self.writer, source, block, change, self.job.format)
                result.specs |= change.specs

    def _compress(
        self, edited: EditedBlock, twin: Block | None, editor: Editor, streams: Streams, result: Result
    ) -> bool:
        """Edit the block's layers, move the dense stream through its `twin`, and tune the block if asked.

        Returns whether it was tuned.
        """
        block = edited.block
        gradients = editor.survey.gradients(block, self.job.source.device)
        dense = streams.dense
        inputs = list(dense.hidden) if dense and self.job.recipe.reconstruct else []  # of the dense block
        views = [v for v in edited.views if v.name in editor.targets]
        for group, stats in result.timing("calibration", self._observed(block, twin, views, streams)):
            with result.timed("compress"):
                for view in group:
                    result.look_at(view.weight)
                for layer in editor.edit_group(edited, group, stats, gradients):
                    result.add(layer)
            del stats  # before the next ones are collected, and before the block is tuned
        if twin and dense and not self.job.paired:
            with result.timed("calibration"):
                dense.advance(twin)
        return dense is not None and self._tune(edited, inputs, dense, streams.calibration, result)

    def _observed(
        self, block: Block, twin: Block | None, views: list[View], streams: Streams
    ) -> Iterator[tuple[list[View], dict[str, Stats]]]:
        """Groups of layers with their statistics, in the order in which the layers are edited."""
        job, stream, recipe = self.job, streams.calibration, self.job.recipe
        if twin and streams.dense and job.paired:
            residual, onward = Need.RESIDUAL in job.method.needs, self._moved(block)
            return observe_both(
                stream, streams.dense, block, twin, views, job.collected, residual, recipe.router_weight,
                onward, self.residual_layers,
            )  # fmt: skip
        observe = observe_in_turn if recipe.order == "true_sequential" else observe_alone
        return observe(stream, block, views, job.collected, recipe.router_weight)

    def _moved(self, block: Block) -> bool:
        """Whether collecting moves the stream of the compressed model too: where nothing changes the block afterwards."""
        return self.job.paired and self.job.recipe.reconstruct is None and block.index < len(self.job.blocks) - 1

    def _tune(
        self, edited: EditedBlock, inputs: list[Tensor], dense: Stream, compressed: Stream, result: Result
    ) -> bool:
        """Tune the edited block towards the dense one's outputs, if asked: `dense` stands behind it, `inputs` before it.

        Returns whether it was tuned.
        """
        block, spec, seed = edited.block, self.job.recipe.reconstruct, self.job.recipe.calibration.seed
        if spec is None or not edited.edits:
            return False

        steps = spec.steps

        def show(step: int) -> None:
            self.progress.doing(f"tuning {block.name}, step {step} of {steps}")

        with result.timed("reconstruct"):
            error = reconstruct(block, compressed, inputs, dense.hidden, edited.edits, spec, seed, show)
        result.reconstruction.append({"block": block.name, "before": error.before, "after": error.after})
        early = f", stopped after {error.steps} of {steps} steps" if error.steps < steps else ""
        self.progress.note(f"reconstructed {block.name}: error {error.before:.2e} -> {error.after:.2e}{early}")
        self.progress.measured(Measured("reconstruct", block.index, asdict(error), block.name))
        return True
