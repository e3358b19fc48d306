"""LoRAP: weighted SVD of attention, with three times the share for values and outputs. Li et al. 2024 (arXiv 2404.09695).

The paper prunes the channels of the MLP; structured pruning is not here yet, so the MLP is factored as attention is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.awsvd import AWSVD


@register("lorap")
@dataclass(frozen=True)
class LoRAP(AWSVD):
    strategy = "per_type"
    type_weights: ClassVar[Mapping[str, float]] = {"v_proj": 3.0, "o_proj": 3.0, "q_proj": 1.0, "k_proj": 1.0}
    remark = "the MLP was factored: pruning its channels, as LoRAP does, is not available"
