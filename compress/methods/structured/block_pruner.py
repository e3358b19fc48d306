"""BlockPruner: attention and MLPs of single blocks go, one after another. Zhong et al. 2024 (arXiv 2406.10594).

Each time the one goes without which the model's perplexity on `windows` calibration windows of full length is least, given
those that are gone. In later rounds only the best twelve of the round before are tried, and all again once few are left. With
`per_parameter` the rise of the log perplexity is divided by the number of parameters. `which` says what may go; not the
attention of the first block.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from paredown.compress.methods.base import SublayerMethod, register


@register("block_pruner")
@dataclass(frozen=True)
class BlockPruner(SublayerMethod):
    which: Literal["any", "attention", "mlp"] = "any"
    windows: Annotated[int, Field(ge=1)] = 8
    per_parameter: bool = False

    def cost(self, loss: float, before: float, numbers: int) -> float:
        return (loss - before) / numbers if self.per_parameter else loss
