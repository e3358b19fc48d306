"""LoRAP: weighted SVD of attention, with three times the share for values and outputs. Li et al. 2024 (arXiv 2404.09695).

The paper prunes the channels of the MLP: that is `lorap_mlp`, a stage of its own, before one of this method whose targets are
attention alone. An MLP among the targets is factored as attention is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from paredown.compress.methods.base import register
from paredown.compress.methods.lowrank.awsvd import AWSVD


@register("lorap")
@dataclass(frozen=True)
class LoRAP(AWSVD):
    strategy = "per_type"
    spread: ClassVar[Mapping[str, Any]] = {"weights": {"v_proj": 3.0, "o_proj": 3.0, "q_proj": 1.0, "k_proj": 1.0}}
    remark = (
        "MLPs among the targets were factored: to prune their channels, as LoRAP does, begin with a stage of lorap_mlp"
    )
