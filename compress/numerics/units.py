"""Which units of a layer's input go with least loss, and the best weight on those that stay. All in float64.

A unit is `width` columns of the weight, side by side. Where the weight changes by E (out, in), the loss is tr(G E H E^T):
H = E[x x^T] (in, in), G (out, out) a metric of the outputs, by default the identity.
"""

import torch
from torch import Tensor

from paredown.compress.numerics.spectral import cholesky_in_place, eigh


def obs_order(
    weight: Tensor,
    gram: Tensor,
    metric: Tensor | None = None,
    damping: float = 0.01,
    width: int = 1,
    stop: int = 0,
    step: int = 16,
    pool: int = 64,
) -> tuple[Tensor, Tensor]:
    """Backward selection by OBS (Hassibi & Stork 1992): the unit goes without which a refit of the others loses least.

    cost_g = tr(V_g M_gg^-1 V_g^T), then V -= V_g M_gg^-1 M_g: and M -= M_:g M_gg^-1 M_g:, where V^T V = W^T G W and
    M = (H + damping mean(diag H) I)^-1. Of the cheapest units, as many as have `pool` columns, those of `step` columns go one
    by one, each by its exact cost then; only then the whole matrices are downdated. Units wider than that go singly.

    weight W (out, in); gram H (in, in); metric G (out, out), or W^T G W (in, in) where out > in; `stop` units stay.
    Returns the others in the order in which they go, and the loss after each, of all that are gone by then:
    (units - stop,) int64 and float64. The loss is that of the damped H. Raises PareError if H cannot be factored.
    """
    units = weight.shape[1] // width
    rest = _Rest(_in_metric(weight, gram.diagonal() == 0, metric), _inverse(gram, damping), width)
    order: list[int] = []
    losses: list[float] = []
    while len(order) < units - stop:
        left = units - len(order)
        cheapest = rest.costs().topk(min(max(pool // width, 1), left), largest=False).indices  # (pool,)
        count = min(max(step // width, 1), left - stop, len(cheapest))
        picked, costs = _one_by_one(*rest.within(cheapest), width, count)
        gone = cheapest[picked]  # (step,)
        order += rest.ids[gone].tolist()
        losses += costs
        rest.remove(gone)
    total = torch.tensor(losses, dtype=torch.float64).cumsum(0)
    return torch.tensor(order, dtype=torch.int64, device=weight.device), total.to(weight.device)


def refitted(weight: Tensor, gram: Tensor, keep: Tensor, damping: float) -> Tensor:  # (out, kept)
    """The weight on the columns S that stay: W_S + W_R H_RS (H_SS + damping mean(diag H_SS) I)^-1, float64.

    The least squares fit to the whole weight's outputs, held near W_S by the damping: never a larger loss than W_S, for any
    metric of outputs. weight (out, in), gram H (in, in), keep S bool (in,). Raises PareError if H_SS cannot be factored.
    """
    stay, go = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
    rows = gram[stay].double()  # (kept, in)
    factor = _factor(rows[:, stay], damping)
    missing = rows[:, go] @ weight[:, go].double().T  # (kept, out)
    del rows
    return torch.cholesky_solve(missing, factor).T.add_(weight[:, stay])


def output_metric(weight: Tensor, moment: Tensor, diagonal: Tensor, damping: float) -> Tensor:
    """(G + damping mean(diag G) I) / (1 + damping), G = E[g g^T] / 2: what an error of the outputs costs, in nats a token.

    Damped because one average stands for a curvature that varies. weight W (out, in); moment E[g g^T] (out, out) of the
    gradient g of the loss, or W^T E[g g^T] W (in, in) where out > in, and so is the result; `diagonal` of E[g g^T] (out,).
    A moment of zeros weighs all outputs alike. float64.
    """
    out, inner = weight.shape
    alike = torch.eye(out, dtype=torch.float64, device=weight.device) if out <= inner else _square(weight.double())
    if not bool(diagonal.any()):
        return alike
    return (moment.double() + damping * diagonal.double().mean() * alike) / (2 * (1 + damping))


class _Rest:
    """V (rows, units * width) and M (units * width, units * width) while units go. Those that are gone are zeros in V."""

    def __init__(self, v: Tensor, inverse: Tensor, width: int) -> None:
        self._v, self._inverse, self._width = v, inverse, width
        self.ids = torch.arange(v.shape[1] // width, device=v.device)  # of the units
        self._gone = torch.zeros_like(self.ids, dtype=torch.bool)

    def costs(self) -> Tensor:  # (units,)
        """Infinite for units that are gone."""
        if self._width == 1:
            costs = self._v.square().sum(0) / self._inverse.diagonal()
        else:
            v = self._v.unflatten(1, (-1, self._width))  # (rows, units, width)
            costs = _costs(torch.einsum("rua,rub->uab", v, v), _blocks(self._inverse, self._width))
        return costs.masked_fill(self._gone, torch.inf)

    def within(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """V^T V and M of these units alone, (pool * width, pool * width) each."""
        at = self._columns(pool)
        return _square(self._v[:, at]), self._inverse[at][:, at]

    def remove(self, units: Tensor) -> None:
        at = self._columns(units)
        share = torch.linalg.solve(self._inverse[at][:, at], self._inverse[at])  # (step * width, in)
        self._v.addmm_(self._v[:, at], share, alpha=-1.0)
        self._inverse.addmm_(self._inverse[:, at], share, alpha=-1.0)
        self._v[:, at] = 0.0
        self._inverse[at], self._inverse[:, at] = 0.0, 0.0
        self._inverse[at, at] = 1.0
        self._gone[units] = True
        if 4 * int(self._gone.sum()) > len(self._gone):  # seldom: it copies
            self._shrink()

    def _shrink(self) -> None:
        stay = (~self._gone).nonzero()[:, 0]
        at = self._columns(stay)
        self._v = self._v[:, at]
        self._inverse = self._inverse[at][:, at]
        self.ids, self._gone = self.ids[stay], self._gone[stay]

    def _columns(self, units: Tensor) -> Tensor:  # (units * width,)
        return (units[:, None] * self._width + torch.arange(self._width, device=units.device)).flatten()


def _one_by_one(squares: Tensor, inverse: Tensor, width: int, count: int) -> tuple[list[int], list[float]]:
    """`count` units in the order in which they go, and each one's cost; squares V^T V and M of a pool of units."""
    picked: list[int] = []
    costs: list[float] = []
    for _ in range(count):
        cost = _costs(_blocks(squares, width), _blocks(inverse, width))  # (pool,)
        cost[picked] = torch.inf
        unit = int(cost.argmin())
        at = slice(unit * width, (unit + 1) * width)
        share = torch.linalg.solve(inverse[at, at], inverse[at])  # (width, in)
        cross = squares[:, at] @ share  # (in, in)
        squares = squares - cross - cross.T + share.T @ squares[at, at] @ share
        inverse = inverse - inverse[:, at] @ share
        inverse[at, at] = torch.eye(width, dtype=inverse.dtype, device=inverse.device)
        picked.append(unit)
        costs.append(max(float(cost[unit]), 0.0))
    return picked, costs


def _costs(squares: Tensor, inverses: Tensor) -> Tensor:  # (units,)
    """tr(M_gg^-1 V_g^T V_g) of each unit, from the blocks (units, width, width) of both."""
    shares: Tensor = torch.linalg.solve(inverses, squares)  # (units, width, width)
    return shares.diagonal(dim1=-2, dim2=-1).sum(-1)


def _blocks(matrix: Tensor, width: int) -> Tensor:  # (units, width, width)
    """The blocks on the diagonal."""
    units = len(matrix) // width
    blocks: Tensor = matrix.view(units, width, units, width).diagonal(dim1=0, dim2=2)  # (width, width, units)
    return blocks.movedim(-1, 0)


def _square(matrix: Tensor) -> Tensor:
    return matrix.T @ matrix


def _in_metric(weight: Tensor, dead: Tensor, metric: Tensor | None) -> Tensor:  # (rows, in)
    """V, whose products V^T V are W^T G W. The columns of `dead` inputs (in,), which nothing depends on, are zeros."""
    if metric is None:
        v = weight.to(torch.float64, copy=True)
    elif weight.shape[0] <= weight.shape[1]:
        v = _root(metric) @ weight.double()
    else:
        v = _root(metric)
    v[:, dead] = 0.0
    return v


def _root(matrix: Tensor) -> Tensor:
    """R, square, with R^T R = `matrix`, which is positive semidefinite."""
    lower, failed = torch.linalg.cholesky_ex(matrix.double())
    if not bool(failed):
        upper: Tensor = lower.T.contiguous()
        return upper
    values, vectors = eigh(matrix.double())
    return values.sqrt()[:, None] * vectors.T


def _inverse(gram: Tensor, damping: float) -> Tensor:  # (in, in)
    inverse: Tensor = torch.cholesky_inverse(_factor(gram, damping))
    return inverse


def _factor(gram: Tensor, damping: float) -> Tensor:  # (in, in)
    """The lower Cholesky factor of H + damping mean(diag H) I; dead inputs get 1 on the diagonal."""
    matrix = gram.to(torch.float64, copy=True)
    diagonal = matrix.diagonal()
    diagonal.copy_(torch.where(diagonal == 0, 1.0, diagonal + damping * diagonal.mean()))
    return cholesky_in_place(matrix)
