"""How many units each group keeps, where groups of different blocks may differ: by what each number of units would cost."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from paredown.compress.allocation.widths import Curve, Size, rounded, standing, uneven
from paredown.compress.errors import PareError
from paredown.compress.machine import return_freed_memory
from paredown.compress.methods.base import GroupMethod, Sliced, Units
from paredown.compress.methods.structured.width import Scored
from paredown.compress.model.blocks import Block
from paredown.compress.model.groups import units_of
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import Stats
from paredown.compress.progress import Counted, ignore
from paredown.compress.shape_job import ShapeJob, unit_numbers
from paredown.compress.survey.direct import Batches, Layer, Pairs, rises
from paredown.compress.survey.gradients import backward
from paredown.compress.survey.products import InputObserver

SHARES = (1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 15 / 16)  # of a group's units, beside none and all
WINDOWS = 16  # on which gradients are taken, of a method that takes none by itself
NEVER = "no calibration token reaches it: calibrate on other text"

Seen = Callable[[Block, Mapping[str, Stats]], None]  # told of each block, in memory, and of its readers' statistics


def widths(
    job: ShapeJob,
    text: Tensor,
    scratch: Path,
    note: Callable[[str], None] = ignore,
    doing: Callable[[str], None] = ignore,
    seen: Seen | None = None,
) -> dict[str, int]:
    """How many units each group keeps, by its name, so that the blocks together keep what the job asks for.

    text (windows, length) is the calibration text, `scratch` an empty folder, `seen` is told of the gradients' moments that
    the method reads. Of all widths within the budget those are taken that lose least by the direct curves, and then the
    method's `shrink` of the way back to equal ones; of a method that scores units, those of the units that stand highest.
    Exact up to one `multiple` of units, of which each group keeps some.
    """
    method = job.method
    assert isinstance(method, GroupMethod)
    if isinstance(method, Scored):
        scores, sizes, numbers = unit_scores(job, method, text, note), group_sizes(job), asked(job)
        chosen = rounded(standing(scores, sizes, numbers, method.step), sizes, numbers, method.step)
    else:
        curves = unit_curves(job, text, scratch, note, doing, seen)
        chosen = chosen_widths(curves, asked(job), method.step, method.shrink)
    note(f"survey, widths: {' '.join(map(str, chosen.values()))}")
    return chosen


def chosen_widths(curves: Mapping[str, Curve], numbers: float, multiple: int, shrink: float) -> dict[str, int]:
    """The widths of `widths` for a budget of so many parameters of all groups."""
    return rounded(uneven(curves, numbers, multiple, shrink), curves, numbers, multiple)


def asked(job: ShapeJob) -> float:
    """How many parameters all groups together keep."""
    method = job.method
    assert isinstance(method, GroupMethod)
    sizes = group_sizes(job)
    if method.units is not None:
        return sum(job.stays(group) * sizes[group.name].numbers for group in job.all_groups)
    whole = sum(size.units * size.numbers for size in sizes.values())
    return whole - (1 - (method.kept or 1.0)) * job.numbers


def group_sizes(job: ShapeJob) -> dict[str, Size]:
    """Of all groups, by name."""
    return {group.name: Size(group.units, unit_numbers(job.source, group)) for group in job.all_groups}


@torch.no_grad()
def unit_scores(
    job: ShapeJob, method: Scored, ids: Tensor, note: Callable[[str], None] = ignore
) -> dict[str, Tensor]:  # (units,)
    """Of each group, by its name, from one pass of ids (windows, length) through the dense model, a block in memory."""
    stream, scores = start(job.source, ids), dict[str, Tensor]()
    for block in job.blocks:
        groups = job.groups.get(block.index, ())
        readers = {group.reader for group in groups}
        with job.source.loaded(block):
            watched = [view for view in block.views() if view.name in readers]
            observer = InputObserver(watched, job.collected, job.source.device, length=ids.shape[1])
            with observer:
                for _ in stream.advancing(block):
                    observer.next_batch()
            for group in groups:
                if group.reader not in observer.stats:
                    raise PareError(f"{group.reader}: {NEVER}.")
                scores[group.name] = method.unit_scores(units_of(group, block, Stats(observer.stats[group.reader])))
        note(Counted.block("survey, scores", block.index, len(job.blocks)))
    return scores


@torch.no_grad()
def unit_curves(
    job: ShapeJob,
    text: Tensor,
    scratch: Path,
    note: Callable[[str], None] = ignore,
    doing: Callable[[str], None] = ignore,
    seen: Seen | None = None,
) -> dict[str, Curve]:
    """What each group loses with fewer units, by its name: see `direct`. From one backward pass with a block in memory.

    Arguments as in `widths`. Raises PareError for a method whose units cannot be measured one group at a time, and for a
    group that no token reaches.
    """
    method = job.method
    assert isinstance(method, GroupMethod)
    ids = text[: method.gradient_windows or WINDOWS]
    stream, pairs, readers = start(job.source, ids), Pairs(ids.numel()), {group.reader for group in job.all_groups}
    needs = job.collected, job.gradients
    passing = backward(job.source, stream, readers, *needs, scratch, method.labels, note, pairs.add)
    curves: dict[str, Curve] = {}
    for block, stats in passing:
        if seen is not None:
            seen(block, stats)
        for group in job.groups.get(block.index, ()):
            doing(f"widths: {group.name}")
            batches = pairs.take(group.reader)
            if not batches:
                raise PareError(f"{group.reader}: {NEVER}.")
            points = _points(method, units_of(group, block, stats[group.reader]), batches)
            curves[group.name] = Curve(group.units, unit_numbers(job.source, group), points)
        del stats
        return_freed_memory()
    doing("")
    return {group.name: curves[group.name] for group in job.all_groups}


def _points(method: GroupMethod, units: Units, batches: Batches) -> list[tuple[int, float]]:
    """Numbers of units, from none to all, and what the group loses with so many, in nats per token.

    `batches` of the group's reader: inputs (tokens, units * width), gradients (tokens, out).
    """
    count, weight = units.group.units, units.weight.float()
    counts = sorted({max(round(share * count), 1) for share in SHARES} - {count})
    cuts = (_layer_of(units, cut) for cut in method.curve(units, counts))
    losses = rises(partial(linear, weight=weight), chain([_nothing], cuts), batches)
    return [*zip([0, *counts], losses, strict=True), (count, 0.0)]


def _nothing(x: Tensor) -> Tensor:
    """A reader without units; it may be added to outputs of any width."""
    return x.new_zeros(len(x), 1)


def _layer_of(units: Units, cut: Sliced) -> Layer:
    """The reader as it is with fewer units, as a function of the whole input (tokens, units * width)."""
    if cut.into is not None:
        raise PareError(
            f"units of {units.group.name} become one, and such a change has no curve: choose another method."
        )
    columns = cut.keep.repeat_interleave(units.width).nonzero()[:, 0]
    weight = (units.weight[:, columns] if cut.weight is None else cut.weight).float()  # (out, kept)
    shift = None if cut.shift is None else cut.shift.float()
    return lambda x: linear(x[:, columns], weight, shift)
