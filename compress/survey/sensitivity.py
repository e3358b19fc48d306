"""How much the model's loss rises when one layer alone is compressed to a share: ASVD's sensitivities, block by block.

Yuan et al. 2023, section 3.3 (arXiv 2312.05821). Each layer and share is a stream of its own that leaves the dense one at
the layer's block, so that weights are read once; how many tokens they carry follows from what memory may hold them.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream, start
from paredown.compress.numerics.moments import InputStats

SHARES = (0.2, 0.4, 0.6, 0.8)
TOKENS = 2048  # of the calibration text, scored for each layer and share
BYTES = 2 << 30  # of hidden states that the streams of all layers may take together

Sensitivities = dict[str, dict[float, float]]  # layer -> share -> loss per token


class Probe:
    """Follows one survey: told each block with its statistics while the block is in memory, asked for losses at the end."""

    def __init__(self, source: ModelSource, ids: Tensor, layers: int) -> None:
        self._source = source
        self._base = start(source, _probe_ids(source, ids, layers * len(SHARES)))
        self._forks: dict[tuple[str, float], Stream] = {}

    def add(self, block: Block, stats: Mapping[str, InputStats], method: Factorized) -> None:
        """Fork a stream for each of the block's layers and shares, and take all earlier ones through the dense block."""
        for fork in self._forks.values():
            fork.advance(block)
        for view in block.views():
            if view.name in stats:
                for share in SHARES:
                    self._fork(block, view, share, stats[view.name], method)
        self._base.advance(block)

    def losses(self) -> Sensitivities:
        found: Sensitivities = {}
        for (name, share), fork in self._forks.items():
            found.setdefault(name, {})[share] = float(fork.nll(self._source).double().mean())
        return found

    def _fork(self, block: Block, view: View, share: float, stats: InputStats, method: Factorized) -> None:
        edit, weight = method.with_share(share).compress(view.weight, stats), view.weight
        if edit is None:
            return
        bias = view.module.bias
        view.assign(edit.dense())
        if edit.shift is not None:
            whole = edit.shift if bias is None else bias.double() + edit.shift  # type: ignore[operator]
            view.module.bias = nn.Parameter(whole.to(weight.dtype), requires_grad=False)
        fork = self._base.copy()
        fork.advance(block)
        self._forks[view.name, share] = fork
        view.assign(weight)
        view.module.bias = bias


def _probe_ids(source: ModelSource, ids: Tensor, forks: int) -> Tensor:
    """The first windows (windows, length), as many tokens as TOKENS and BYTES allow; one window may be cut."""
    element = source.dtype.itemsize if source.dtype else 2
    width = int(getattr(source.config.get_text_config(), "hidden_size", 4096))
    tokens = max(16, min(TOKENS, BYTES // max(1, forks * width * element)))
    length = min(ids.shape[1], tokens)
    return ids[: max(1, tokens // length), :length].contiguous()
