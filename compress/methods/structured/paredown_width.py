"""Ours: the unit goes whose loss is least after a refit of all others, then the next; the reader is fitted to what stays.

The losses are nats by a Kronecker model of the loss: inputs weighed by H = E[x x^T], outputs by G, half the second moment of
the gradient at the reader's output, each damped. The order is OBS, exact but for the pool that `obs_order` looks ahead in,
and the refit a least squares fit to the whole weight's output on the dense model's inputs. No bias is added.

Optimal brain surgeon: Hassibi & Stork 1992. The metric of both sides: Martens & Grosse 2015, K-FAC (arXiv 1503.05671).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from paredown.compress.methods.base import Damping, GroupMethod, Shape, Sliced, Units, register
from paredown.compress.methods.structured.width import check_count, made_up
from paredown.compress.numerics.moments import Need
from paredown.compress.numerics.units import obs_order, output_metric


@register("paredown_width")
@dataclass(frozen=True)
class PareDownWidth(GroupMethod):
    damping: Damping = 0.01  # of H, for the order and the refit
    output_damping: Damping = 0.5  # of G
    refit: bool = True
    gradient_windows: Annotated[int, Field(ge=1)] = 16  # of the calibration text, on which G is taken

    needs = frozenset({Need.GRAM, Need.OUTPUT_GRADIENT, Need.OUTPUT_GRADIENT_DIAGONAL})

    def compress(self, units: Units, keep: int) -> Sliced:
        check_count(units, keep)
        weight, gram, gradient = units.weight, units.stats.inputs.gram, units.stats.gradient
        moment, diagonal = gradient(Need.OUTPUT_GRADIENT), gradient(Need.OUTPUT_GRADIENT_DIAGONAL)
        metric = output_metric(weight, moment, diagonal, self.output_damping)
        gone, _ = obs_order(weight, gram, metric, self.damping, units.width, stop=keep)
        del gram, moment, metric  # before the refit makes its own
        stay = torch.ones(units.group.units, dtype=torch.bool, device=weight.device)
        stay[gone] = False
        return made_up(units, stay, self.damping if self.refit else None, shift=False)

    def working_bytes(self, shape: Shape) -> int:
        out, inner = shape
        return 28 * inner**2 + 16 * out * inner + 12 * min(shape) ** 2
