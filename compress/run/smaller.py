"""The walk that leaves an ordinary smaller model: some blocks are skipped, and of the others units are taken away."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from paredown.compress.checkpoint.bias_flags import with_biases
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import set_tensor
from paredown.compress.errors import PareError
from paredown.compress.machine import return_freed_memory
from paredown.compress.methods.base import BlockMethod, GroupMethod
from paredown.compress.methods.structured.experts import ExpertMethod
from paredown.compress.model.blocks import Block
from paredown.compress.model.reshape import Reshaped, reshaped
from paredown.compress.model.stream import Stream, start
from paredown.compress.numerics.moments import Stats
from paredown.compress.recovery.reconstruct import reconstruct
from paredown.compress.run.cut import entry_of, experts_of, left_of, record_of, tensors_of, units_of
from paredown.compress.run.refit import Refit
from paredown.compress.run.result import LayerResult, Result
from paredown.compress.run.smaller_files import write_block, write_rest
from paredown.compress.run.streams import Streams, advance
from paredown.compress.run.walk import Walk, summary
from paredown.compress.shape_job import ShapeJob, block_numbers
from paredown.compress.survey.depth import profile
from paredown.compress.survey.experts import ExpertObserver
from paredown.compress.survey.gradients import backward
from paredown.compress.survey.products import InputObserver
from paredown.compress.survey.survey import Survey

NEVER = "no calibration token reaches it: calibrate on other text"


@dataclass
class SmallerRun(Walk):
    """A walk that removes blocks, or units of every block."""

    job: ShapeJob

    @torch.no_grad()
    def run(self) -> Result:
        """Walk the model from its first block to its last, or from where an interrupted run stopped.

        Raises PareError if the family's config cannot describe what remains, or if activations are not finite.
        """
        job, result, state = self.job, Result(), self.journal.state if self.journal else None
        self.remark_on_family(result)
        with self.writer.scratch() as scratch:
            if state:
                self.progress.note(f"going on after {state.facts['blocks']} blocks")
                result.restore(state.facts["result"])
                measured, dropped = Survey(scratch), state.facts["survey"]
            else:
                with result.timed("survey"):
                    measured, dropped = self._survey(scratch)
            small = reshaped(job.source, [i for i in range(len(job.blocks)) if i not in dropped], job.units)
            if isinstance(job.method, GroupMethod) and job.method.shifts:
                small = self._with_biases(small)
            result.fallbacks += [remark for remark in small.remarks if remark not in result.fallbacks]
            result.seconds.setdefault("compress", 0.0)
            streams = Streams.start(job, self.calibration.ids, self.evaluations, result)
            if state:
                state.restore(streams.named())
            self._walk(small, measured, streams, result, state.facts["blocks"] if state else 0)
            with result.timed("evaluation"):
                self.score(streams, result)
        with result.timed("write"):
            write_rest(self.writer, job.source, job.blocks, small)
        result.smaller = small
        result.seconds["forward"] = sum(s.seconds for s in streams.named().values())
        return result

    def _survey(self, scratch: Path) -> tuple[Survey, list[int]]:
        """What is measured of the dense model first: gradients, on the disk, and which blocks go."""
        job, method, measured, ids = self.job, self.job.method, Survey(scratch), self.calibration.surveyed
        note = self.progress.note
        if isinstance(method, BlockMethod):
            found = profile(job.source, job.blocks, self.calibration.ids, method, job.drop, note, self.progress.doing)
            dropped = method.choose(found, len(job.blocks), job.drop)
            note(f"blocks that go: {', '.join(map(str, dropped))}")
            return measured, dropped
        if job.gradients:
            readers = {group.reader for group in job.all_groups}
            text = start(job.source, ids[: method.gradient_windows])
            passing = backward(job.source, text, readers, frozenset(), job.gradients, scratch, method.labels, note)
            for block, stats in passing:
                measured.keep_gradients(block, stats, job.gradients)
                del stats  # free them before the next block's are collected
                return_freed_memory()
        return measured, []

    def _with_biases(self, small: Reshaped) -> Reshaped:
        """The smaller model with a bias in each layer that reads a group, by a setting of its family, if there is one."""
        source = self.job.source
        names = [small.renamed(f"{group.reader}.bias") for group in self.job.all_groups]
        bare = [name.removesuffix(".bias") for name in names if name and name not in small.model.state_dict()]
        if not bare:
            return small
        found = with_biases(small.config, bare)
        if found is None:
            untold = f"a {source.family} model has no place for a bias of {bare[0]}: the mean of what goes is not made up for"
            return replace(small, remarks=[*small.remarks, untold])
        model = skeleton(found[0], {}, source.dtype or torch.bfloat16)
        blocks = [replace(block, module=model.get_submodule(block.name)) for block in small.blocks]
        return replace(small, config=found[0], model=model, blocks=blocks)

    def _walk(self, small: Reshaped, measured: Survey, streams: Streams, result: Result, done: int) -> None:
        """Make all blocks that stay but the first `done`, saving the state between them."""
        blocks, kept = self.job.blocks, small.kept
        dropped = [i for i in range(len(blocks)) if i not in kept]
        for position in range(done, len(kept)):
            self.save(position, len(kept), streams, result, lambda: (dropped, {}))
            if position == 0:
                self._skip(blocks[: kept[0]], streams, result)
            block, began = blocks[kept[position]], perf_counter()
            after = blocks[block.index + 1 : kept[position + 1] if position + 1 < len(kept) else len(blocks)]
            with _in_memory(small, small.blocks[position]):
                self._block(block, small.blocks[position], after, small, measured, streams, result)
            return_freed_memory()
            self.progress.block(summary(block, len(blocks), result, perf_counter() - began))
        self.save(len(kept), len(kept), streams, result, lambda: (dropped, {}))
        self.progress.doing("")

    def _block(
        self,
        block: Block,
        target: Block,
        skipped: Sequence[Block],
        small: Reshaped,
        measured: Survey,
        streams: Streams,
        result: Result,
    ) -> None:
        """Make `target` of `block`, run all streams through it and past the blocks that are `skipped`, and write it."""
        job, doing, dense = self.job, self.progress.doing, streams.dense
        doing(f"reading {block.name} and running it")
        refit = None
        with _timed_load(self, block, result):
            with result.timed("evaluation"):
                advance(streams.before, block)
            inputs = list(dense.hidden) if dense else []
            changed = self._cut(block, target, measured, streams, result) if isinstance(job.method, GroupMethod) else {}
            _fill(small, target, block, changed)
            if dense and isinstance(job.method, BlockMethod):
                with result.timed("compress"):
                    refit = Refit.begun(streams.calibration, dense, target, block, job.method) if job.refits else None
                with result.timed("calibration"):
                    dense.advance(block)
        self._skip(skipped, streams, result)
        if refit and dense:
            with result.timed("compress"):
                refit.last(dense.hidden)
            changed |= refit.changed
        tuned = dense is not None and self._tune(target, inputs, dense, streams, result)
        doing(f"running {target.name} as it is now, and writing it")
        if dense or isinstance(job.method, BlockMethod):
            with result.timed("calibration"):
                streams.calibration.advance(target)
        with result.timed("evaluation"):
            advance([*streams.after, streams.probe], target)
        result.add(LayerResult(block_numbers(block), block_numbers(target)))
        with result.timed("write"):
            write_block(self.writer, job.source, block, target, small, None if tuned else changed.keys())

    def _skip(self, blocks: Sequence[Block], streams: Streams, result: Result) -> None:
        """Run the dense model's texts through blocks that go."""
        for block in blocks:
            self.progress.doing(f"running {block.name}, which goes")
            with _timed_load(self, block, result):
                with result.timed("calibration"):
                    advance([streams.dense] if streams.dense else [], block)
                with result.timed("evaluation"):
                    advance(streams.before, block)
            result.add(LayerResult(block_numbers(block), 0))

    def _cut(
        self, block: Block, target: Block, measured: Survey, streams: Streams, result: Result
    ) -> dict[str, Tensor]:
        """The tensors that change, by full name. The dense model's calibration text goes through the block meanwhile.

        Statistics are the dense model's: channels lie inside a block, and their refit to the compressed one brings nothing.
        """
        job, method = self.job, self.job.method
        assert isinstance(method, GroupMethod)
        if isinstance(method, ExpertMethod):
            return self._fewer_experts(method, block, streams, result)
        readers = {v.name: v for v in block.views()}
        watched = [readers[group.reader] for group in job.groups.get(block.index, ())]
        observer = InputObserver(watched, job.collected, job.source.device, length=self.calibration.ids.shape[1])
        with result.timed("calibration"), observer:
            for _ in (streams.dense or streams.calibration).advancing(block):
                observer.next_batch()
        gradients = measured.gradients(block, job.source.device)
        changed: dict[str, Tensor] = {}
        with result.timed("compress"):
            for group in job.groups.get(block.index, ()):
                if group.reader not in observer.stats:
                    raise PareError(f"{group.reader}: {NEVER}.")
                stats = Stats(observer.stats[group.reader]).with_gradients(gradients.get(group.reader, {}))
                units = units_of(group, block, stats)
                self.progress.doing(f"choosing channels of {group.name}")
                began, keep = perf_counter(), job.units[group.config_key]
                cut = method.compress(units, keep)
                if f"{group.reader}.bias".removeprefix(block.prefix) not in target.module.state_dict():
                    cut = replace(cut, shift=None)
                changed |= tensors_of(block, readers[group.reader], group, cut)
                result.layers.append(record_of(job.recipe.method, units, cut, perf_counter() - began))
        return changed

    def _fewer_experts(self, method: ExpertMethod, block: Block, streams: Streams, result: Result) -> dict[str, Tensor]:
        """As `_cut`, of experts."""
        job, groups = self.job, self.job.groups.get(block.index, ())
        observer = ExpertObserver(block, groups if method.reads_outputs else ())
        with result.timed("calibration"), observer:
            for _ in (streams.dense or streams.calibration).advancing(block):
                pass
        changed: dict[str, Tensor] = {}
        with result.timed("compress"):
            for group in groups:
                self.progress.doing(f"choosing experts of {group.name}")
                began = perf_counter()
                experts = experts_of(group, block, observer.of(group) if method.reads_outputs else None)
                cut = method.compress(experts, job.units[group.config_key])
                changed |= left_of(block, group, cut)
                result.layers.append(entry_of(group.name, job.recipe.method, cut, None, perf_counter() - began))
        return changed

    def _tune(self, target: Block, inputs: list[Tensor], dense: Stream, streams: Streams, result: Result) -> bool:
        """Tune the block towards the dense outputs, if the recipe asks for it. Returns whether it was tuned."""
        spec = self.job.recipe.reconstruct
        if spec is None:
            return False

        def show(step: int) -> None:
            self.progress.doing(f"tuning {target.name}, step {step} of {spec.steps}")

        whole = dict.fromkeys(v.name for v in target.views())
        seed = self.job.recipe.calibration.seed
        with result.timed("reconstruct"):
            error = reconstruct(target, streams.calibration, inputs, dense.hidden, whole, spec, seed, show)
        self.progress.note(f"reconstructed {target.name}: error {error.before:.2e} -> {error.after:.2e}")
        return True


@contextmanager
def _timed_load(run: SmallerRun, block: Block, result: Result) -> Iterator[None]:
    with ExitStack() as stack:
        with result.timed("read"):
            stack.enter_context(run.job.source.loaded(block))
        yield


@contextmanager
def _in_memory(small: Reshaped, target: Block) -> Iterator[None]:
    """A block of the smaller model while it is made; its tensors are freed afterwards."""
    empty = {name: tensor for name, tensor in target.module.state_dict().items()}
    try:
        yield
    finally:
        for name, tensor in empty.items():
            set_tensor(small.model, target.prefix + name, tensor)


def _fill(small: Reshaped, target: Block, block: Block, changed: Mapping[str, Tensor]) -> None:
    """Give the smaller model's block its tensors: the `changed` ones, by full name in `block`, and that block's own."""
    own = block.module.state_dict()
    for name, empty in target.module.state_dict().items():
        value = changed.get(block.prefix + name, own.get(name))
        if value is None:  # a bias that the family's setting gives further layers
            value = torch.zeros(empty.shape, dtype=empty.dtype, device=next(iter(own.values())).device)
        set_tensor(small.model, target.prefix + name, value)
