"""The loss of the model with one layer alone compressed to a share of its size: ASVD's sensitivities, block by block.

Yuan et al. 2023, section 3.3 (arXiv 2312.05821). Each layer and share is a stream of its own, which branches off the
dense model's at the layer's block: each block is read once for all of them. The number of tokens is limited so that
the hidden states of all streams fit into memory.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from paredown.compress.allocation.base import option_for
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.job import Job
from paredown.compress.model.blocks import Block, View, by_owner
from paredown.compress.model.stream import Stream, hidden_bytes, start
from paredown.compress.numerics.moments import Stats

SHARES = (0.2, 0.4, 0.6, 0.8)
TOKENS = 2048  # of the calibration text, for each layer and share
BYTES = 2 << 30  # limit on the hidden states of all streams together


class SensitivityProbe:
    """Add each block with the statistics of its layers, while the block is in memory; then ask for the losses."""

    def __init__(self, job: Job, ids: Tensor, views: Sequence[View]) -> None:
        """ids (windows, length) is the calibration text; `views` are the layers that are going to be compressed."""
        self._job, self._layers = job, {view.name for view in views}
        self._dense = start(job.source, _probe_ids(job.source, ids, len(by_owner(views)) * len(SHARES)))
        self._branches: dict[tuple[str, float], Stream] = {}  # by layer and share

    def add(self, block: Block, stats: Mapping[str, Stats]) -> None:
        """Start a stream for each layer in `stats` and each share; all others advance through the dense block."""
        for stream in self._branches.values():
            stream.advance(block)
        for owner, members in by_owner(v for v in block.views() if v.name in self._layers).items():
            reached = [view for view in members if view.name in stats]
            for share in SHARES if reached else ():
                self._branch(block, owner, reached, share, stats)
        self._dense.advance(block)

    def losses(self) -> dict[str, dict[float, float]]:
        """The model's loss in nats per token, by layer and share."""
        losses: dict[str, dict[float, float]] = {}
        for (name, share), stream in self._branches.items():
            losses.setdefault(name, {})[share] = float(stream.nll(self._job.source).double().mean())
        return losses

    def _branch(
        self, block: Block, owner: str, views: Sequence[View], share: float, stats: Mapping[str, Stats]
    ) -> None:
        """Compress one layer, or all experts of a fused weight, advance a new stream through the block, and undo it."""
        method, before = self._job.method_of(views[0]), []
        option = option_for(self._job.layer(owner, views[:1], method.choices(views[0].shape)), share)
        for view in views:
            weight, bias = view.weight if view.expert is None else view.weight.clone(), view.bias
            edit = method.at(option).compress(weight, stats[view.name])
            if edit is None:
                continue
            before.append((view, weight, bias, edit.shift))
            view.assign(edit.dense())
            if edit.shift is not None:
                view.assign_bias((edit.shift if bias is None else bias.double() + edit.shift).to(weight.dtype))
        if before:
            stream = self._dense.copy()
            stream.advance(block)
            self._branches[owner, share] = stream
        for view, weight, bias, shift in before:
            view.assign(weight)
            if shift is not None:
                view.assign_bias(bias)


def _probe_ids(source: ModelSource, ids: Tensor, streams: int) -> Tensor:
    """The first windows (windows, length), as many tokens as TOKENS and BYTES allow. The first window may be cut."""
    tokens = max(16, min(TOKENS, BYTES // max(1, streams * hidden_bytes(source, 1))))
    length = min(ids.shape[1], tokens)
    return ids[: max(1, tokens // length), :length].contiguous()
