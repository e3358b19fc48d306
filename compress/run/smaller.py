"""The walk that leaves an ordinary smaller model: some blocks are skipped, and of the others units are taken away."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import set_tensor
from paredown.compress.errors import PareError
from paredown.compress.machine import return_freed_memory
from paredown.compress.methods.base import BlockMethod, GroupMethod, SublayerMethod
from paredown.compress.methods.structured.experts import ExpertMethod
from paredown.compress.model.blocks import Block
from paredown.compress.model.groups import units_of
from paredown.compress.model.reshape import Reshaped
from paredown.compress.model.stream import Stream, start
from paredown.compress.numerics.moments import Stats
from paredown.compress.progress import Measured
from paredown.compress.recovery.reconstruct import reconstruct
from paredown.compress.run.chosen import Chosen, smaller
from paredown.compress.run.cut import entry_of, experts_of, fit_experts, left_of, record_of, tensors_of
from paredown.compress.run.refit import Refit
from paredown.compress.run.result import LayerResult, Result
from paredown.compress.run.smaller_files import write_block, write_rest
from paredown.compress.run.streams import Streams, advance
from paredown.compress.run.survey_cache import gradients_of, rounds_of
from paredown.compress.run.walk import Walk, summary
from paredown.compress.shape_job import ShapeJob, block_numbers
from paredown.compress.survey.depth import profile
from paredown.compress.survey.experts import ExpertObserver
from paredown.compress.survey.gradients import backward
from paredown.compress.survey.merged import merged
from paredown.compress.survey.products import InputObserver
from paredown.compress.survey.rounds import Rounds
from paredown.compress.survey.sublayers import chosen_sublayers
from paredown.compress.survey.survey import Survey
from paredown.compress.survey.widths import NEVER, widths


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
                measured, chosen = Survey(scratch), Chosen.restored(state.facts["survey"])
            else:
                with result.timed("survey"):
                    measured, chosen = self._survey(scratch)
            small = smaller(job, chosen)
            result.fallbacks += [said for said in (*job.remarks, *small.remarks) if said not in result.fallbacks]
            result.seconds.setdefault("compress", 0.0)
            streams = self.start(result, state)
            self._walk(small, chosen, measured, streams, result, state.facts["blocks"] if state else 0)
            with result.timed("evaluation"):
                self.score(streams, result)
        with result.timed("write"):
            write_rest(self.writer, job.source, job.blocks, small)
        result.smaller, result.sizes = small, chosen.sizes
        result.merged = [[index for index, _ in mix] for mix in chosen.stay if len(mix) > 1]
        result.seconds["forward"] = sum(s.seconds for s in streams.named().values())
        return result

    def _survey(self, scratch: Path) -> tuple[Survey, Chosen]:
        """What is measured of the dense model first: gradients, on the disk, which blocks stay, and units of each group."""
        job, method, measured, ids = self.job, self.job.method, Survey(scratch), self.calibration.surveyed
        note = self.progress.note
        if isinstance(method, BlockMethod):
            greedy = method.reads in ("divergence", "loss")
            rounds = self._rounds(method.reads, method.windows) if greedy else None
            found = profile(
                job.source, job.blocks, self.calibration.ids, method, job.drop, note, self.progress.doing, rounds
            )
            stay = method.stay(found, len(job.blocks), job.drop)
            gone = {block.index for block in job.blocks} - {mix[0][0] for mix in stay}
            note(f"blocks that go: {', '.join(map(str, sorted(gone)))}")
            return measured, Chosen(stay)
        if isinstance(method, SublayerMethod):
            rounds = self._rounds(repr(replace(method, kept=None, drop=1)), method.windows)  # how many go changes none
            absent = chosen_sublayers(
                job.source, job.blocks, self.calibration.ids, method, job.sublayers, job.goes, note, self.progress.doing,
                rounds,
            )  # fmt: skip
            return measured, Chosen.all_blocks(job, absent=[sublayer.name for sublayer in absent])
        if method.uneven:

            def keep(block: Block, stats: Mapping[str, Stats]) -> None:
                measured.keep_gradients(block, stats, job.gradients)

            return measured, Chosen.all_blocks(job, widths(job, ids, scratch, note, self.progress.doing, keep))
        if job.gradients:
            ids = ids[: method.gradient_windows]
            measured = gradients_of(job, ids, partial(self._gradients, ids, scratch), scratch, self.cache, note)
        sizes = {group.name: job.stays(group) for group in job.all_groups} if job.uneven else {}
        return measured, Chosen.all_blocks(job, sizes)

    def _gradients(self, ids: Tensor, scratch: Path) -> Survey:
        """Moments of the gradients at the readers' outputs."""
        job, measured, text = self.job, Survey(scratch), start(self.job.source, ids)
        readers = {group.reader for group in job.all_groups}
        for block, stats in backward(
            job.source, text, readers, frozenset(), job.gradients, scratch, job.method.labels, self.progress.note
        ):
            measured.keep_gradients(block, stats, job.gradients)
            del stats  # free them before the next block's are collected
            return_freed_memory()
        return measured

    def _rounds(self, what: str, windows: int) -> Rounds:
        return rounds_of(self.job, self.calibration.ids[:windows], what, self.cache, self.progress.note)

    def _walk(
        self, small: Reshaped, chosen: Chosen, measured: Survey, streams: Streams, result: Result, done: int
    ) -> None:
        """Make all blocks that stay but the first `done`, saving the state between them."""
        blocks, kept = self.job.blocks, small.kept
        for position in range(done, len(kept)):
            self.save(position, len(kept), streams, result, lambda: (chosen.state(), {}))
            if position == 0:
                self._skip(blocks[: kept[0]], streams, result)
            block, began = blocks[kept[position]], perf_counter()
            after = blocks[block.index + 1 : kept[position + 1] if position + 1 < len(kept) else len(blocks)]
            with _in_memory(small, small.blocks[position]):
                self._block(block, chosen, small.blocks[position], after, small, measured, streams, result)
            return_freed_memory()
            self.progress.block(summary(block, len(blocks), result, perf_counter() - began))
        self.save(len(kept), len(kept), streams, result, lambda: (chosen.state(), {}))
        self.progress.doing("")

    def _block(
        self,
        block: Block,
        chosen: Chosen,
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
                advance(streams.before.values(), block)
            inputs = list(dense.hidden) if dense else []
            if isinstance(job.method, GroupMethod):
                changed = self._cut(block, target, chosen, measured, streams, result)
            else:
                mix = next(mix for mix in chosen.stay if mix[0][0] == block.index)
                changed = merged(job.source, job.blocks, mix)
            _fill(small, target, block, changed)
            if dense and not isinstance(job.method, GroupMethod):
                with result.timed("compress"):
                    refit = self._refit(streams, dense, target, block)
                with result.timed("calibration"):
                    dense.advance(block)
        self._skip(skipped, streams, result)
        if refit and dense:
            with result.timed("compress"):
                refit.last(dense.hidden)
            changed |= refit.changed
        tuned = dense is not None and self._tune(target, inputs, dense, streams, result)
        doing(f"running {target.name} as it is now, and writing it")
        if dense or not isinstance(job.method, GroupMethod):
            with result.timed("calibration"):
                streams.calibration.advance(target)
        with result.timed("evaluation"):
            advance([*streams.after, streams.probe], target)
        result.add(LayerResult(block_numbers(block), block_numbers(target)))
        with result.timed("write"):
            write_block(self.writer, job.source, block, target, small, None if tuned else changed.keys())

    def _refit(self, streams: Streams, dense: Stream, target: Block, block: Block) -> Refit | None:
        method = self.job.method
        if not isinstance(method, BlockMethod) or not method.refits:
            return None
        return Refit.begun(streams.calibration, dense, target, block, method)

    def _skip(self, blocks: Sequence[Block], streams: Streams, result: Result) -> None:
        """Run the dense model's texts through blocks that go."""
        for block in blocks:
            self.progress.doing(f"running {block.name}, which goes")
            with _timed_load(self, block, result):
                with result.timed("calibration"):
                    advance([streams.dense] if streams.dense else [], block)
                with result.timed("evaluation"):
                    advance(streams.before.values(), block)
            result.add(LayerResult(block_numbers(block), 0))

    def _cut(
        self, block: Block, target: Block, chosen: Chosen, measured: Survey, streams: Streams, result: Result
    ) -> dict[str, Tensor]:
        """The tensors that change, by full name. The dense model's calibration text goes through the block meanwhile.

        Statistics are the dense model's: channels lie inside a block, and their refit to the compressed one brings nothing.
        """
        job, method = self.job, self.job.method
        assert isinstance(method, GroupMethod)
        if isinstance(method, ExpertMethod):
            return self._fewer_experts(method, block, target, chosen, streams, result)
        readers = {v.name: v for v in block.views()}
        watched = [readers[group.reader] for group in job.groups.get(block.index, ())]
        if method.reads_writers:
            parts = {part.name for group in job.groups.get(block.index, ()) for part in group.parts}
            watched += [v for v in readers.values() if v.stored_name in parts and v not in watched]
        length, vectors = self.calibration.ids.shape[1], {g.reader: g.vector for g in job.groups.get(block.index, ())}
        observer = InputObserver(watched, job.collected, job.source.device, length=length, vectors=vectors)
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
                units = units_of(group, block, stats, observer.stats)
                self.progress.doing(f"choosing {group.kind} of {group.name}")
                began, keep = perf_counter(), chosen.units(job, group)
                if keep == group.units:  # where blocks differ, some may stay whole
                    continue
                cut = method.compress(units, keep)
                if f"{group.reader}.bias".removeprefix(block.prefix) not in target.module.state_dict():
                    cut = replace(cut, shift=None)
                changed |= tensors_of(block, readers[group.reader], group, cut)
                result.layers.append(record_of(job.recipe.method, units, cut, perf_counter() - began))
        return changed

    def _fewer_experts(
        self, method: ExpertMethod, block: Block, target: Block, chosen: Chosen, streams: Streams, result: Result
    ) -> dict[str, Tensor]:
        """As `_cut`, of experts."""
        job, groups, stream = self.job, self.job.groups.get(block.index, ()), streams.dense or streams.calibration
        observer = ExpertObserver(block, groups if method.reads_outputs else (), method.reads_logits)
        with result.timed("calibration"), observer:
            for _ in stream.outputs(block) if method.fit else stream.advancing(block):
                pass
        changed: dict[str, Tensor] = {}
        for group in groups:
            self.progress.doing(f"choosing experts of {group.name}")
            began, error = perf_counter(), None
            with result.timed("compress"):
                experts = experts_of(group, block, observer.of(group) if method.reads_outputs else None)
                cut = method.compress(experts, chosen.units(job, group))
                changed |= left_of(block, group, cut)
                if method.fit:
                    error = fit_experts(method.fit, block, target, group, changed, stream, result.fallbacks)
            result.layers.append(entry_of(group.name, job.recipe.method, cut, error, perf_counter() - began))
        if method.fit:
            with result.timed("calibration"):
                stream.advance(block)
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
        result.reconstruction.append({"block": target.name, "before": error.before, "after": error.after})
        self.progress.note(f"reconstructed {target.name}: error {error.before:.2e} -> {error.after:.2e}")
        self.progress.measured(Measured("reconstruct", target.index, asdict(error), target.name))
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
