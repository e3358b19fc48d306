"""Mamba-Shedder: the block goes without which perplexity is least, again and again. Munoz et al. 2025 (arXiv 2501.17088).

As `greedy_depth`, by the model's own loss on `windows` calibration windows and not by its distance from the dense model. The
paper removes the blocks of Mamba models so, which hold nothing else; of hybrids, blocks of any kind. (It goes on inside
blocks: MLPs and attention of hybrids are those of `block_pruner`, and its removal of the SSM alone is not here.)
"""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.structured.greedy_depth import GreedyDepth


@register("mamba_shedder")
@dataclass(frozen=True)
class MambaShedder(GreedyDepth):
    reads = "loss"
