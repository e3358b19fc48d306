"""What would happen: matched layers, bytes, memory and disk, from headers alone, before any weight is read."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from paredown.compress.allocation.budget import DATA_DRIVEN, AllocationSpec, Curve, by_share
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import FLUSH_BYTES
from paredown.compress.errors import PareError
from paredown.compress.job import for_format, spread
from paredown.compress.machine import available_memory
from paredown.compress.methods import Method
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.model.blocks import View, blocks, known, never, select
from paredown.compress.model.stream import BATCH_TOKENS, name_of
from paredown.compress.numerics.edits import storage_kind
from paredown.compress.numerics.masks import check_width, kept_count
from paredown.compress.numerics.moments import GRADIENT_NEEDS, RESIDUAL_NEEDS
from paredown.compress.recipe import Recipe
from paredown.compress.storage.kinds import stored_bytes, stored_numbers
from paredown.compress.survey.survey import share_of_model


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, counts in weights. `memory` is the peak above what the imported libraries take."""

    family: str
    known_family: bool
    blocks: int
    targeted: list[str]
    left_out: list[str]  # linears that patterns or rules leave as they are
    unsupported: list[str]  # matrices that no method sees
    parameters: int
    targeted_parameters: int
    kept_parameters: int
    bytes_before: int
    bytes_after: int
    memory: int
    stay_dense: list[str] = field(default_factory=list)  # targeted, but what would be stored of them is no less
    at_most: bool = False  # `kept_parameters` and `bytes_after` are the most there may be: the text decides
    memory_parts: dict[str, int] = field(default_factory=dict)

    @property
    def shrinks(self) -> bool:
        return self.bytes_after < self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "disk": self.bytes_after, "shrinks": self.shrinks}


def make_plan(
    source: ModelSource, recipe: Recipe, method: Method, tokens: tuple[int, Sequence[int]], format: str = "packed"
) -> Plan:
    """`tokens`: those of the calibration, and of each evaluation text.

    Raises PareError for a pattern that matches nothing, for a width that the sparsity does not divide, and where the
    recipe's parts, or recipe and format, do not go together.
    """
    settled: Any = for_format(source, recipe, method, format)
    all_blocks = blocks(source)
    views = [view for block in all_blocks for view in block.views()]
    head = name_of(source.model, "get_output_embeddings")
    chosen, left = select(views, [*recipe.targets.include], [*recipe.targets.skip], head)
    if hasattr(settled, "chosen_blocks"):  # which blocks may be for the data to say, how many is not
        inside = tuple(all_blocks[i].prefix for i in settled.chosen_blocks([0.0] * len(all_blocks)))
        left += [v for v in chosen if not v.name.startswith(inside)]
        chosen = [v for v in chosen if v.name.startswith(inside)]
    element = source.dtype.itemsize if source.dtype else 2
    allocation = spread(settled, recipe.allocation, [v.name for v in chosen])
    size = sum(prod(v.shape) for v in chosen if v.expert is None)
    if isinstance(settled, Factorized) and settled.target_parameters:
        settled = settled.with_share(share_of_model(source, settled, size))
    own = _by_layer(settled, allocation, chosen)
    by_text = allocation.strategy in DATA_DRIVEN or bool(getattr(settled, "energy", None))
    specs = {v.name: None if by_text else _spec(v, own.get(v.name), element) for v in chosen}
    saved = sum(prod(v.shape) * element - _stored(v.shape, specs[v.name], element, format) for v in chosen)
    kept = sum(prod(v.shape) if (spec := specs[v.name]) is None else _kept(spec) for v in chosen)
    if by_text and settled.share:
        kept -= size - int(settled.share * size)
        saved += 0 if format == "dense" else _saved_at_least(chosen, settled, size, element)
    before = sum(entry.bytes for entry in source.files.entries.values())
    parts = _memory(source, recipe, chosen, settled, tokens, element)
    steering = [
        n for b in all_blocks for n in dict.fromkeys(k.rpartition(".")[0] for k in b.names) if never(b.prefix + n)
    ]
    return Plan(
        family=source.family,
        known_family=known(source),
        blocks=len(all_blocks),
        targeted=[v.name for v in chosen],
        left_out=[v.name for v in left] + [all_blocks[0].prefix + n for n in dict.fromkeys(steering)],
        unsupported=[name for block in all_blocks for name in block.others()],
        parameters=sum(t.numel() for t in source.parameters.values()),
        targeted_parameters=sum(prod(v.shape) for v in chosen),
        kept_parameters=kept,
        bytes_before=before,
        bytes_after=before - saved,
        memory=_peak(parts),
        stay_dense=[v.name for v in chosen if specs[v.name] is None and (v.expert is not None or not by_text)],
        at_most=by_text,
        memory_parts=parts,
    )


def check_room(plan: Plan, out: Path, device: str) -> None:
    """Raises PareError if the disk of `out`, or the host's memory, is too small for the plan."""
    folder = next(p for p in [out, *out.absolute().parents] if p.exists())
    free = shutil.disk_usage(folder).free
    if free < plan.bytes_after:
        raise PareError(
            f"the disk of {folder} has {free / 1e9:.1f} GB free, and the checkpoint needs {plan.bytes_after / 1e9:.1f} GB: "
            f"free {(plan.bytes_after - free) / 1e9:.1f} GB, or name another output with -o."
        )
    memory = available_memory()
    if memory is not None and memory < plan.memory:
        raise PareError(
            f"{plan.memory / 1e9:.1f} GB of memory are needed and {memory / 1e9:.1f} GB are free: "
            f"{(plan.memory - memory) / 1e9:.1f} GB are missing. Take fewer or shorter windows "
            "(--set calibration.sequences=..., --set evaluate.windows=...)."
        )


def _by_layer(method: Any, allocation: AllocationSpec, chosen: list[View]) -> dict[str, Any]:
    """The method with each layer's own rank where shapes alone give one; None where the allocation leaves it dense."""
    if allocation.strategy != "per_type":
        return dict.fromkeys([v.name for v in chosen], method)
    curves = [Curve(v.name, v.shape) for v in chosen if v.expert is None]
    ranks = by_share(curves, method.share, allocation.weights, method.largest, method.numbers)
    return {name: None if rank is None else method.with_rank(rank) for name, rank in ranks.items()}


def _spec(view: View, method: Any, element: int) -> dict[str, Any] | None:
    """How an edited weight will be stored, or None for a weight that stays dense."""
    try:
        if method is None:
            return None
        if hasattr(method, "spec"):
            spec = method.spec(view.shape, element) if view.expert is None else None
            # a bias that the layer has already takes up the shift
            return spec and {**spec, "bias": bool(spec.get("bias")) and view.module.bias is None}
        check_width(view.shape[1], method.sparsity)
    except PareError as fault:
        raise PareError(f"{view.name}: {fault}") from fault
    kept = kept_count(view.shape, method.sparsity)
    return {"kind": storage_kind(view.shape, kept, method.sparsity, element), "shape": view.shape, "kept": kept}


def _saved_at_least(chosen: list[View], method: Factorized, size: int, element: int) -> int:
    """Bytes, where one budget is spent as the text tells: PIFA's order of rows comes on top of it."""
    orders = sum(4 * v.shape[0] for v in chosen if v.expert is None) if method.kind == "pifa" else 0
    return (size - int((method.share or 1.0) * size)) * element - orders


def _kept(spec: dict[str, Any]) -> int:
    return int(spec["kept"]) if spec["kind"] == "dense" else stored_numbers(spec)


def _stored(shape: tuple[int, int], spec: dict[str, Any] | None, element: int, format: str) -> int:
    """Bytes of one weight on disk."""
    if format == "dense" or spec is None or spec["kind"] == "dense":
        return prod(shape) * element
    return stored_bytes(spec, element)


def _memory(
    source: ModelSource,
    recipe: Recipe,
    chosen: list[View],
    method: Any,
    tokens: tuple[int, Sequence[int]],
    element: int,
) -> dict[str, int]:
    """The parts of the peak. What lives together is added up in `_peak`."""
    block = blocks(source)[0]
    inside = tuple(b.prefix for b in blocks(source))
    width = max(_hidden(source), 1)
    in_block = [v for v in chosen if v.name.startswith(block.prefix)] or chosen[:1]
    block_weights = sum(source.parameters[block.prefix + n].numel() for n in block.names)
    edited = sum(prod(v.shape) for v in in_block)
    largest = max((prod(v.shape) for v in in_block), default=0)
    inputs = {v.shape[1] for v in in_block}
    widest = max(inputs, default=0)
    factored = isinstance(method, Factorized)
    # of the widest one in float64: a factorizer reads a copy and regresses in another; a sweep factors and inverts it
    wide = 1 + ("cross" in method.needs) if factored else 3
    grams = sum(8 * n * n for n in inputs) + wide * 8 * widest**2 if "gram" in method.needs else 0
    small = [min(v.shape) for v in in_block]
    if hasattr(method, "spec"):  # float64: copies of the largest weight, and of the smaller side's moments
        # regression adds what it aims at, and what that makes up for; two forms are compared where one has a bias
        copies = 4 + 2 * ("cross" in method.needs) + (factored and "mean" in method.needs)
        grams += 8 * (copies * largest + 4 * max(small, default=0) ** 2)
    if "cross" in method.needs and not method.needs & RESIDUAL_NEEDS:
        # its sums and a copy; with a residual the widest layer is a writer, of which no cross moment is collected
        grams += 2 * 8 * widest**2
    # float32
    gradients = 4 * sum(n * n for n in small) if method.needs & GRADIENT_NEEDS else 0
    rest = [prod(t.shape) for n, t in source.parameters.items() if not n.startswith(inside)]
    vocabulary = source.config.get_text_config().vocab_size
    calibration, evaluations = tokens
    tuned = recipe.reconstruct is not None
    followed = "cross" in method.needs or tuned
    batch = BATCH_TOKENS[source.device.type]
    return {
        # read, and the edited copies beside them until the block is dropped
        "block": element * (block_weights + edited),
        # one shard is filled while another is written, and saving makes one more copy
        "pending": 3 * (FLUSH_BYTES + edited * 9 // 8 * element // 2),
        # float32 scores, their columns and the mask of the largest layer, beside what is counted above
        "solver": (0 if factored else 10 * largest) + grams + gradients,
        "activations": element * width * (calibration * (2 if followed else 1) + 2 * sum(evaluations)),
        "batch": element * batch * (4 * width + 3 * max((v.shape[0] for v in in_block), default=0)),
        # float32 masters, their gradients and what those come from, Adam's two moments, the tensors in use and as they
        # were; what autograd keeps of a batch; and the dense block's inputs
        "tuning": (20 + 2 * element) * edited
        + element * (batch * sum(sum(v.shape) for v in in_block) + width * calibration)
        if tuned
        else 0,
        # at the start and at the end: embedding or head, and the logits of a few positions
        "outside": element * max(rest, default=0) + 12 * 512 * vocabulary,
    }


def _peak(parts: dict[str, int]) -> int:
    walking = parts["block"] + parts["pending"] + max(parts["solver"], parts["batch"], parts["tuning"])
    return parts["activations"] + max(walking, parts["outside"])


def _hidden(source: ModelSource) -> int:
    return int(getattr(source.config.get_text_config(), "hidden_size", 0))
