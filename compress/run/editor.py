"""Compress the layers of one block and put each edit in place, where the next layers and blocks see it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter

from torch import Tensor, nn

from paredown.compress.allocation.base import Options
from paredown.compress.errors import PareError
from paredown.compress.job import Format, Job
from paredown.compress.methods.base import WeightMethod
from paredown.compress.model.blocks import Block, View, by_owner
from paredown.compress.numerics.edits import WeightEdit, joined
from paredown.compress.numerics.moments import PAIRED_NEEDS, InputStats, Need, Stats, uniform_gradients
from paredown.compress.progress import ignore
from paredown.compress.run.result import LayerResult
from paredown.compress.run.write import BlockChange
from paredown.compress.storage.spec import Spec
from paredown.compress.survey.survey import Survey


@dataclass
class EditedBlock:
    """A block with edits in place of some of its layers, until `restore`."""

    block: Block
    format: Format
    views: list[View] = field(init=False)  # of the block's original layers
    edits: dict[str, WeightEdit] = field(init=False, default_factory=dict)  # by view name
    biases: dict[str, Tensor] = field(init=False, default_factory=dict)  # changed or added ones, by full name
    originals: dict[str, nn.Module] = field(
        init=False, default_factory=dict
    )  # layers that packed ones replaced, by name
    with_bias: set[str] = field(init=False, default_factory=set)  # packed layers with a bias that the dense ones lack

    def __post_init__(self) -> None:
        self.views = self.block.views()

    def place(self, view: View, edit: WeightEdit) -> int:
        """Put the edit in place of the layer; returns how many numbers a bias adds that the dense layer does not have."""
        bias = self._bias(view, edit)
        self.edits[view.name] = edit
        packed = self.format != "dense" and view.expert is None  # experts are packed together, when they are written
        module = edit.module(view.module, view.layout, bias) if packed else None
        if module is None:
            view.assign(edit.dense())
            if bias is not None:
                view.assign_bias(bias)
            return 0
        self.originals[view.name] = self.block.replace(view.name, module)
        if bias is None or view.bias is not None:
            return 0
        self.with_bias.add(view.name)
        return view.shape[0]

    def change(self, tuned: bool) -> BlockChange:
        """All that is written of the block. `tuned`: its parameters were trained after the edits were placed."""
        trained = dict(self.block.module.named_parameters()) if tuned else {}
        edits = {v.name: self._current(v, trained) for v in self.views if v.name in self.edits}
        dense: dict[str, Tensor] = {}
        specs: dict[str, Spec] = {}
        packed: dict[str, Mapping[str, Tensor]] = {}
        replaced: set[str] = set()
        for owner, members in self._edited_owners().items():
            first = members[0]
            edit = _joined(members, edits)
            spec = None if self.format == "dense" else edit.spec(first.layout)
            if spec is None:
                dense[first.stored_name] = first.module.get_parameter(first.parameter)
                continue
            specs[owner] = replace(spec, bias=owner in self.with_bias)
            packed[owner] = edit.tensors()
            replaced.add(first.stored_name)
        vectors = self._vectors(trained, packed) if tuned else self.biases
        return BlockChange({**vectors, **dense}, specs, packed, frozenset(replaced))

    def restore(self) -> None:
        """Give the block its original layers back."""
        for name, layer in self.originals.items():
            self.block.replace(name, layer)
        self.originals.clear()

    def _edited_owners(self) -> dict[str, list[View]]:
        """What is written as one weight, by its name: a layer, or all experts of a fused parameter; edited ones only."""
        owners = by_owner(self.views)
        return {owner: members for owner, members in owners.items() if any(v.name in self.edits for v in members)}

    def _current(self, view: View, trained: Mapping[str, Tensor]) -> WeightEdit:
        """The edit with the numbers that the block holds now; `trained` is empty if they have not changed."""
        edit = self.edits[view.name]
        if not trained:
            return edit
        path = f"{view.name.removeprefix(self.block.prefix)}."
        own = {name.removeprefix(path): p for name, p in trained.items() if name.startswith(path)}
        return edit.tuned(view.weight, own)

    def _vectors(self, trained: Mapping[str, Tensor], packed: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Norms and biases, which tuning changes too, by full name."""
        parts = {f"{owner}.{part}" for owner, tensors in packed.items() for part in tensors}
        vectors = {self.block.prefix + name: p for name, p in trained.items() if p.dim() == 1}
        return {name: p for name, p in vectors.items() if name not in parts}

    def _bias(self, view: View, edit: WeightEdit) -> Tensor | None:  # (out,)
        """The layer's bias with the edit's shift added; None if the edit has none."""
        if edit.shift is None:
            return None
        own = view.bias
        bias: Tensor = (edit.shift if own is None else own.double() + edit.shift).to(view.weight.dtype)
        self.biases[f"{view.name}.bias"] = bias
        return bias


def _joined(members: Sequence[View], edits: Mapping[str, WeightEdit]) -> WeightEdit:
    """The edit of a layer, or one edit of all experts of a fused parameter."""
    first = members[0]
    return edits[first.name] if first.expert is None else joined(first.whole, [edits.get(v.name) for v in members])


@dataclass(frozen=True)
class Editor:
    """Compresses layers by a job, with what the survey measured and the option that the allocation gives each."""

    job: Job
    survey: Survey
    options: Options | None  # None: each layer settles its own
    targets: frozenset[str]  # names of the views that are edited
    doing: Callable[[str], None] = ignore

    @contextmanager
    def editing(self, block: Block) -> Iterator[EditedBlock]:
        """The block while it is edited, run and written. It gets its original layers back, whatever happens."""
        edited = EditedBlock(block, self.job.format)
        try:
            yield edited
        finally:
            edited.restore()

    def edit_group(
        self,
        edited: EditedBlock,
        group: Sequence[View],
        stats: Mapping[str, Stats],
        gradients: Mapping[str, Mapping[Need, Tensor]],
    ) -> Iterator[LayerResult]:
        """Compress layers, among them all or no experts of a fused weight, and put the edits in place.

        `stats` and `gradients`, moments of the gradient at a layer's output, are by layer name, without the layers that no
        token reached: the recipe's `idle` says what becomes of these. Raises PareError naming the layer if one cannot be
        compressed.
        """
        common = self._common_options(group, stats)
        for view in group:
            yield self._edit(edited, view, stats.get(view.name), gradients.get(view.name, {}), common)

    def _common_options(self, group: Sequence[View], stats: Mapping[str, Stats]) -> Options:
        """By view name, the option of experts whose own data decides: the largest that one of their fused weight needs."""
        options: Options = {}
        if not self.job.method.budget.by_data:
            return options
        for members in by_owner(v for v in group if v.expert is not None).values():
            method = self.job.method_of(members[0])
            own = [method.own_option(v.weight, stats[v.name]) for v in members if v.name in stats]
            largest = None if None in own else max(own, default=None)
            options |= {view.name: largest for view in members}
        return options

    def _edit(
        self, edited: EditedBlock, view: View, stats: Stats | None, gradients: Mapping[Need, Tensor], common: Options
    ) -> LayerResult:
        size = view.weight.numel()
        remarks: list[str] = []
        if stats is None:
            stats = self._unreached(view, remarks)
            if stats is None:
                return LayerResult(fallbacks=tuple(remarks))
        else:
            stats = stats.with_gradients(gradients)
        if not self.job.gradients <= stats.gradients.keys():
            if view.expert is None:
                return LayerResult(
                    size, size, fallbacks=(f"{view.name}: no gradient of the loss reaches it; left dense",)
                )
            stats = stats.with_gradients(uniform_gradients(self.job.gradients, view.weight))
        self.doing(f"compressing {view.name}")
        began, weight = perf_counter(), view.weight
        method = self.job.method_for(view, common if view.name in common else self.options)
        edit = self._compress(method, view, weight, stats, remarks)
        if edit is None:
            return LayerResult(size, size, fallbacks=tuple(remarks))
        if edit.fallback:
            remarks.append(f"{view.name}: {edit.fallback}")
        error, edit = edit.missed(weight, stats.inputs), edit.final()
        numbers = edit.numbers + edited.place(view, edit)
        record = {
            "name": view.name,
            "method": self.job.recipe.method,
            "kept": numbers / size,
            "relative_error": error,
            "damping": edit.damping,
            "flops_per_token": 2 * numbers,  # of each token that reaches the layer; removed weights cost none
            "seconds": perf_counter() - began,
            **edit.facts,
        }
        if view.expert is not None:  # of which there are too many
            record.pop("spectrum", None)
        if (rank := edit.facts.get("rank")) is not None:
            record["predicted_loss"] = self.survey.predicted(view.owner, rank)
        return LayerResult(size, numbers, record, tuple(remarks))

    def _unreached(self, view: View, remarks: list[str]) -> Stats | None:
        """Statistics for a layer that no token reached, or None if it stays as it is; `remarks` gains the reason."""
        job = self.job
        if view.expert is None:
            remarks.append(f"{view.name}: never called as a layer, so it was left as it is")
            return None
        found = f"{view.name}: no calibration token reached this expert"
        if job.recipe.idle == "dense" and not job.method.chain:
            remarks.append(f"{found}; left dense (idle: dense)")
            return None
        beside = (
            " (idle: dense, but an expert cannot stay dense beside factored ones)" if job.recipe.idle == "dense" else ""
        )
        remarks.append(f"{found}; scored without data{beside}")
        stats = Stats(InputStats.uniform(view.shape[1], job.collected & PAIRED_NEEDS, job.source.device))
        return stats.with_gradients(uniform_gradients(job.gradients, view.weight))

    def _compress(
        self, method: WeightMethod | None, view: View, weight: Tensor, stats: Stats, remarks: list[str]
    ) -> WeightEdit | None:
        """The method's edit, or None if the weight stays dense; `remarks` gains the reason."""
        if method is None:
            remarks.append(f"{view.name}: left dense by the allocation")
            return None
        try:
            edit = method.compress(weight, stats)
        except PareError as fault:
            raise PareError(f"{view.name}: {fault}") from fault
        if edit is None:
            remarks.append(f"{view.name}: left dense, because factors would store no less")
        return edit
