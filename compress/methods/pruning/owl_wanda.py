"""OWL with Wanda: blocks with more outliers keep more. Yin et al. 2024 (arXiv 2310.05175): see allocation/owl."""

from dataclasses import dataclass

from paredown.compress.methods.base import register
from paredown.compress.methods.pruning.wanda import Wanda


@register("owl_wanda")
@dataclass(frozen=True)
class OWLWanda(Wanda):
    strategy = "owl"
