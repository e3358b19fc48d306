"""Statistics of a block's layers: of all layers in one pass, or of one group after another where two streams are compared.

A group is the layers that share an input, such as q, k and v. A method that aims at the dense model's outputs reads two
streams: the compressed model's, through the block as it is edited, and the dense model's, through an unedited `twin`.
"""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn

from paredown.compress.machine import return_freed_memory
from paredown.compress.model.blocks import Block, View, by_owner
from paredown.compress.model.routing import RouterWeights
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import Need, Stats
from paredown.compress.survey.products import InputObserver
from paredown.compress.survey.residual import Kind, ResidualLayers
from paredown.compress.survey.sides import Side, dense_side, kept_room, observe_paired, observe_residual


def observe(
    stream: Stream, block: Block, views: list[View], needs: frozenset[Need], router_weight: bool = False
) -> dict[str, Stats]:
    """Statistics of each view's input, by view name; without the views that no token reached.

    `router_weight`: those of experts weigh each token as the router does.
    """
    router = RouterWeights(views) if router_weight else None
    observer = InputObserver(views, needs, stream.device, router, stream.ids[0].shape[1])
    with observer, router or nullcontext():
        for _ in stream.outputs(block):
            observer.next_batch()
    stream.seconds -= observer.seconds  # the time of collecting is not the model's own
    return {name: Stats(inputs) for name, inputs in observer.stats.items()}


def observe_alone(
    stream: Stream, block: Block, views: list[View], needs: frozenset[Need], router_weight: bool = False
) -> Iterator[tuple[list[View], dict[str, Stats]]]:
    """As `observe_both`, where only one stream is read: all views as a single group."""
    yield views, observe(stream, block, views, needs, router_weight)


def observe_in_turn(
    stream: Stream, block: Block, views: list[View], needs: frozenset[Need], router_weight: bool = False
) -> Iterator[tuple[list[View], dict[str, Stats]]]:
    """As `observe_alone`, group after group: the input of each comes from the layers before it as they are by then."""
    for group in fused_together(groups(stream, block, views)):
        yield group, observe(stream, block, group, needs, router_weight)
        return_freed_memory()


def observe_both(
    stream: Stream,
    dense: Stream,
    block: Block,
    twin: Block,
    views: list[View],
    needs: frozenset[Need],
    residual: bool,
    router_weight: bool = False,
    onward: bool = False,
    known: dict[Kind, set[str]] | None = None,
) -> Iterator[tuple[list[View], dict[str, Stats]]]:
    """Each group of views, with statistics of both streams by view name, in the order in which the block calls them.

    The caller edits a group before it asks for the next one, whose input then comes from the edited layers. In the end the
    dense stream stands behind its block, and the other one too with `onward`. `residual`: layers that add to the residual
    stream get a Residual instead of the cross moment; those `known` from other blocks are not looked for again.
    """
    in_groups = called_groups(stream, block, views)
    owners = {view.owner for group in in_groups for view in group}
    # a layer of which no product is seen is edited last, wherever it stands: nothing is final before
    in_turn = views if all(view.owner in owners for view in views) else []
    in_order = fused_together(_with_others(in_groups, views))
    layers = ResidualLayers.of(stream, block, in_order, known) if residual else ResidualLayers([])
    room = kept_room(stream.device)
    own = Side(stream, block, layers, in_turn, room)
    other = dense_side(dense, twin, layers.of_twin(twin), [group[0] for group in in_order], in_turn, room)
    try:
        for group in in_order:
            yield group, _of_both(own, other, group, needs, router_weight)
            own.passed(group)
            return_freed_memory()
        other.advance()
        if onward:
            own.advance()
    finally:
        own.close()
        other.close()


def _of_both(
    own: Side, other: Side, group: list[View], needs: frozenset[Need], router_weight: bool
) -> dict[str, Stats]:
    """Statistics of both streams by view name, for one group."""
    view = group[0]
    if view.expert is not None:  # the two models do not send the same tokens to an expert
        other.passed(group)
        return observe(own.stream, own.block, group, needs - {Need.CROSS}, router_weight)
    observe_one = observe_residual if view in own.layers.views else observe_paired
    stats = observe_one(own, other, view, needs)
    other.passed(group)
    return_freed_memory()
    return {} if stats is None else {view.name: stats for view in group}


def groups(stream: Stream, block: Block, views: list[View]) -> list[list[View]]:
    """Views that share an input, in the order in which the block calls them; those never called are the last group."""
    return _with_others(called_groups(stream, block, views), views)


def called_groups(stream: Stream, block: Block, views: list[View]) -> list[list[View]]:
    """As `groups`, without views that the block does not call."""
    observer = InputObserver(views, frozenset(), stream.device)
    with observer:
        stream.output(block, 0)
    by_name = {v.name: v for v in views}
    return [[by_name[name] for name in names] for names in observer.groups()]


def _with_others(called: list[list[View]], views: list[View]) -> list[list[View]]:
    known = {view.name for group in called for view in group}
    others = [view for view in views if view.name not in known]
    return called + ([others] if others else [])


def fused_together(in_order: list[list[View]]) -> list[list[View]]:
    """The same groups, where all experts of a fused weight are one, at the place of the first that the block calls."""
    experts = by_owner(view for group in in_order for view in group if view.expert is not None)
    together: list[list[View]] = []
    for group in in_order:
        for view in group:
            if view.expert is not None and (members := experts.pop(view.owner, None)):
                together.append(members)
        if others := [view for view in group if view.expert is None]:
            together.append(others)
    return together


def shared_copy(block: Block) -> Block:
    """A twin of the block: other modules, the same weights in the same memory. It stays dense while the block is edited.

    Only fused parameters of experts are copied, because an edit of one expert writes into the tensor of all.
    """
    shared: dict[int, Tensor] = {id(t): t for t in [*block.module.parameters(), *block.module.buffers()]}
    for view in block.views():
        if view.expert is not None:
            fused = view.tensor
            if shared[id(fused)] is fused:
                shared[id(fused)] = nn.Parameter(fused.clone(), requires_grad=False)
    return replace(block, module=copy.deepcopy(block.module, shared))
