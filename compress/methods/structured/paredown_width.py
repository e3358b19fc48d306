"""Ours: the unit goes whose loss is least after a refit of all others, then the next; the reader is fitted to what stays.

The losses are nats by a Kronecker model of the loss: inputs weighed by H = E[x x^T], outputs by G, half the second moment of
the gradient at the reader's output, each damped. The order is OBS, exact but for the pool that `obs_order` looks ahead in,
and the refit a least squares fit to the whole weight's output on the dense model's inputs. No bias is added.

By default all blocks get the same width. With `widths: direct` they share one budget by curves that are measured token by
token, `E[(g . (W a - W_S a_S))^2] / 2`: not by the Kronecker model, in which tokens with huge inputs own whole blocks. On
text like the calibration the widths of these curves lose least, on other text those halfway back to equal ones.

Optimal brain surgeon: Hassibi & Stork 1992. The metric of both sides: Martens & Grosse 2015, K-FAC (arXiv 1503.05671).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from paredown.compress.methods.base import Damping, Shape, Sliced, Units, register
from paredown.compress.methods.structured.width import WidthMethod, check_count, made_up
from paredown.compress.numerics.moments import Need
from paredown.compress.numerics.units import obs_order, output_metric


@register("paredown_width")
@dataclass(frozen=True)
class PareDownWidth(WidthMethod):
    damping: Damping = 0.01  # of H, for the order and the refit
    output_damping: Damping = 0.5  # of G
    refit: bool = True
    gradient_windows: Annotated[int, Field(ge=1)] = 16  # of the calibration text, on which G is taken
    widths: Literal["uniform", "direct"] = "uniform"  # as many units in every block, or by what they cost in each
    shrink: Annotated[float, Field(ge=0, le=1)] = 0.5  # how much of the way from such widths back to equal ones

    needs = frozenset({Need.GRAM, Need.OUTPUT_GRADIENT, Need.OUTPUT_GRADIENT_DIAGONAL})

    @property
    def uneven(self) -> bool:
        return self.widths == "direct"

    def compress(self, units: Units, keep: int) -> Sliced:
        return next(self.curve(units, [keep]))

    def curve(self, units: Units, counts: Sequence[int]) -> Iterator[Sliced]:
        """One order serves all counts: fewer units stay where more of it is gone."""
        for keep in counts:
            check_count(units, keep)
        gone = self._order(units, min(counts))
        for keep in counts:
            stay = torch.ones(units.group.units, dtype=torch.bool, device=gone.device)
            stay[gone[: units.group.units - keep]] = False
            yield made_up(units, stay, self.damping if self.refit else None, shift=False)

    def _order(self, units: Units, stop: int) -> Tensor:  # (units - stop,)
        """All units but `stop`, in the order in which they go."""
        weight, gradient = units.weight, units.stats.gradient
        moment, diagonal = gradient(Need.OUTPUT_GRADIENT), gradient(Need.OUTPUT_GRADIENT_DIAGONAL)
        metric = output_metric(weight, moment, diagonal, self.output_damping)
        return obs_order(weight, units.stats.inputs.gram, metric, self.damping, units.width, stop=stop)[0]

    def working_bytes(self, shape: Shape) -> int:
        out, inner = shape
        return 28 * inner**2 + 16 * out * inner + 12 * min(shape) ** 2
