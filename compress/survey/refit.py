"""A new weight for a layer that writes to the residual stream, so that the stream is nearest to what it should be there.

Where blocks behind it are removed, what it should be is the dense model's stream in front of the next one that stays.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.least_squares import regressed
from paredown.compress.numerics.moments import InputStats, Need
from paredown.compress.survey.products import run_with_capture
from paredown.compress.survey.residual import silenced


@torch.no_grad()
def refit_towards(
    stream: Stream, block: Block, view: View, later: list[View], target: Callable[[int], Tensor], damping: float
) -> Tensor:  # (out, in)
    """The weight W of a residual layer nearest to its own W0 with which the stream behind it is nearest to `target`.

    `stream` stands before `block`, whose residual layers after this one are `later`; target(i) (batch, length, hidden) is
    for batch i. With the layer's input y, and the stream z that leaves the block while `later` are silent,

        W = W0 + E[(target - z) y^T] (E[y y^T] + damping * mean(diag E[y y^T]) I)^-1,

    which minimises E|target - z - (W - W0) y|^2 + damping * mean(diag E[y y^T]) |W - W0|^2; a bias stays as it is. Moments
    are float32 within a batch, float64 across, and solved in float64; the result is float64. A layer that no token reaches
    keeps its weight. Raises PareError, naming the layer, for inputs or a target that are not finite.
    """
    inputs = InputStats(view.shape[1], frozenset({Need.GRAM}), stream.device)
    cross = torch.zeros(view.shape, dtype=torch.float64, device=stream.device)  # (out, in)
    try:
        with silenced(later):
            for i in range(len(stream.hidden)):
                output, x, _ = run_with_capture(stream, block, view, i)
                if x is None:
                    continue
                y = x.reshape(-1, view.shape[1]).float()  # (tokens, in)
                missing = (target(i).to(stream.device).float() - output.float()).reshape(len(y), -1)  # (tokens, out)
                inputs.update(y)
                cross += missing.T @ y
        if not inputs.count:
            return view.weight.double()
        if not bool(torch.isfinite(cross.sum())):
            raise PareError("what its output should be holds NaN or infinite values: try --dtype float32.")
        return view.weight.double() + regressed(cross.div_(inputs.count), inputs.gram, damping)
    except PareError as error:
        raise PareError(f"{view.name}: {error}") from error
