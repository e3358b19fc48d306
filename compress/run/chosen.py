"""What is decided before a walk that leaves a smaller model: which blocks stay, and what is not alike in all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.bias_flags import with_biases
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.methods.base import Group, GroupMethod, Mix
from paredown.compress.model.narrower import check_narrower
from paredown.compress.model.reshape import Reshaped, reshaped
from paredown.compress.model.uneven import uneven
from paredown.compress.shape_job import ShapeJob


@dataclass(frozen=True)
class Chosen:
    """What a survey chose."""

    stay: Sequence[Mix]  # the blocks that stay, in order
    sizes: Mapping[str, int] = field(default_factory=dict)  # units by the name of a group, where blocks differ
    absent: Sequence[str] = ()  # full names of modules of blocks that stay, such as model.layers.3.self_attn

    @classmethod
    def all_blocks(cls, job: ShapeJob, sizes: Mapping[str, int] | None = None, absent: Sequence[str] = ()) -> "Chosen":
        """All blocks stay."""
        return cls([((block.index, 1.0),) for block in job.blocks], sizes or {}, absent)

    def state(self) -> dict[str, Any]:
        """What `restored` reads, as plain data for JSON."""
        return asdict(self)

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> "Chosen":
        stay = [tuple((index, weight) for index, weight in mix) for mix in state["stay"]]
        return cls(stay, state["sizes"], state["absent"])

    def units(self, job: ShapeJob, group: Group) -> int:
        """How many units of a group stay."""
        return self.sizes[group.name] if job.uneven else job.stays(group)


def smaller(job: ShapeJob, chosen: Chosen) -> Reshaped:
    """The model that remains. Raises PareError if neither a config of the family nor our format describes it."""
    if chosen.sizes or chosen.absent:
        small = uneven(job.source, chosen.sizes, job.all_groups, chosen.absent)
    else:
        small = reshaped(job.source, [mix[0][0] for mix in chosen.stay], job.values)
        if job.groups:
            check_narrower(job.source, small, job.groups)
    return _biased(job, small) if isinstance(job.method, GroupMethod) and job.method.shifts else small


def _biased(job: ShapeJob, small: Reshaped) -> Reshaped:
    """The smaller model with a bias in each layer that reads a group, by a setting of its family, if there is one."""
    source = job.source
    names = [small.renamed(f"{group.reader}.bias") for group in job.all_groups]
    bare = [name.removesuffix(".bias") for name in names if name and name not in small.model.state_dict()]
    if not bare:
        return small
    found = with_biases(transformers_plugin.dense_config(small.config), bare)
    if found is None:
        untold = (
            f"a {source.family} model has no place for a bias of {bare[0]}: the mean of what goes is not made up for"
        )
        return replace(small, remarks=[*small.remarks, untold])
    config, gained = found
    sizes = small.shapes.sizes
    biases = {name: sizes[w][:1] for name in gained if (w := f"{name.removesuffix('bias')}weight") in sizes}
    shapes = replace(small.shapes, sizes={**sizes, **biases})
    model = skeleton(config, {}, source.dtype or torch.bfloat16, shapes)
    blocks = [replace(block, module=model.get_submodule(block.name)) for block in small.blocks]
    if shapes:
        config = transformers_plugin.packed_config(config, {}, source.verbatim, shapes)
    return replace(small, config=config, model=model, blocks=blocks, shapes=shapes)
