"""What of a block goes to the writer: edited weights packed or dense, everything else as it was stored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.model.blocks import Block, View
from paredown.compress.numerics.edits import Edit, LowRank, Masked, storage_kind
from paredown.compress.storage import kinds

Format = Literal["packed", "dense"]


@dataclass(frozen=True)
class Edited:
    """One block's changes: its views, the edits by view name, and other tensors by full name (biases, tuned norms).

    `specs`, by view name, are those of edits that are no masks and stand in the block as packed layers.
    """

    views: Sequence[View]
    edits: Mapping[str, Edit]
    changed: dict[str, Tensor] = field(default_factory=dict)
    specs: Mapping[str, Any] = field(default_factory=dict)


def write_block(
    writer: CheckpointWriter,
    source: ModelSource,
    block: Block,
    edited: Edited,
    format: Format,
    modules: dict[str, Any],
) -> None:
    """Hand the block's tensors to the writer; `modules` gains the specs of packed weights, for config.json."""
    owners: dict[str, list[View]] = {}  # a fused parameter of experts is written as one
    for view in edited.views:
        owners.setdefault(view.owner, []).append(view)
    owners = {owner: views for owner, views in owners.items() if any(v.name in edited.edits for v in views)}
    names = {owner: f"{owner}.weight" if views[0].expert is None else owner for owner, views in owners.items()}
    done = {*names.values(), *edited.changed}
    dense = dict(source.read(block.prefix + n for n in block.names if block.prefix + n not in done)) | edited.changed
    for owner, views in owners.items():
        found = None if format == "dense" else _packed(views, edited)
        if found is None:
            dense[names[owner]] = views[0].raw if views[0].expert is None else _whole(views[0])
            continue
        modules[owner], tensors = found
        for part, tensor in tensors.items():
            writer.add(f"{owner}.{part}", tensor, kind=modules[owner]["kind"])
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


def _packed(views: list[View], edited: Edited) -> tuple[dict[str, Any], Mapping[str, Tensor]] | None:
    """The spec of an edited weight and its tensors; None where the dense weight is no larger."""
    first = edited.edits.get(views[0].name)
    if isinstance(first, LowRank):
        return edited.specs[views[0].name], first.tensors
    masks = {name: edit for name, edit in edited.edits.items() if isinstance(edit, Masked)}
    keep, sparsity = _joint_mask(views, masks)
    weight, kept = views[0].weight if views[0].expert is None else _whole(views[0]), int(torch.count_nonzero(keep))
    kind = storage_kind(tuple(weight.shape), kept, sparsity, weight.element_size())
    if kind == "dense":
        return None
    spec = {"kind": kind, "layout": views[0].layout, "shape": list(weight.shape), "kept": kept}
    return spec, kinds.pack(kind, weight, keep)


def _whole(view: View) -> Tensor:  # (experts, out, in)
    found: Tensor = getattr(view.module, view.parameter)
    return found


def _joint_mask(views: list[View], edits: Mapping[str, Masked]) -> tuple[Tensor, Any]:
    """The mask of a weight, or of all experts of a fused one; experts that stay dense keep everything."""
    found = [edits[v.name].keep if v.name in edits else torch.ones_like(v.weight, dtype=torch.bool) for v in views]
    patterns = {edits[v.name].sparsity if v.name in edits else None for v in views}
    sparsity = patterns.pop() if len(patterns) == 1 else 0.0
    return (found[0] if views[0].expert is None else torch.stack(found)), sparsity  # ([experts,] out, in)
