"""One-to-one assignments."""

import torch
from torch import Tensor


def matched(products: Tensor) -> Tensor:  # (rows,) int64
    """Of each row the column that it is given, each column once, so that the entries add up to most.

    `products` (rows, columns), as many of both. The assignment is exact (Crouse 2016, a shortest augmenting path).
    """
    from scipy.optimize import linear_sum_assignment  # here, so that all other methods run without it

    _, columns = linear_sum_assignment(products.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(products.device)
