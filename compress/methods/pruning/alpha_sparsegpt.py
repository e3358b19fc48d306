"""AlphaPruning with SparseGPT: blocks whose spectra have heavier tails keep more. Lu et al. 2024 (arXiv 2410.10912): see
allocation/alpha_pruning.
"""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.sparsegpt import SparseGPT


@register("alpha_sparsegpt")
@dataclass(frozen=True)
class AlphaSparseGPT(SparseGPT):
    strategy = "alpha_pruning"
