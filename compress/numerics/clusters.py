"""k-means (Lloyd 1982) on inner products alone: points of many dimensions are multiplied once. float64."""

import torch
from torch import Tensor


def kmeans(products: Tensor, count: int, seed: int = 0, rounds: int = 100) -> Tensor:  # (points,)
    """A label below `count` for each point, int64; every label is used. `products` (points, points) are inner products.

    It starts from the centres of k-means++ (Arthur & Vassilvitskii 2007), drawn with the seed, and ends where no label
    changes, at the latest after so many rounds. 1 <= count <= points.
    """
    products = products.double()
    centres = _spread(products, count, seed)
    labels = _nearest(products[:, centres], products.diagonal()[centres], products)
    for _ in range(rounds):
        sizes = labels.bincount(minlength=count)  # (count,)
        with_means = products.new_zeros(len(labels), count).index_add_(1, labels, products) / sizes  # (points, count)
        own = with_means.gather(1, labels[:, None])[:, 0]  # (points,)
        lengths = products.new_zeros(count).index_add_(0, labels, own) / sizes  # squared, of the means
        moved = _nearest(with_means, lengths, products)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _spread(products: Tensor, count: int, seed: int) -> Tensor:  # (count,)
    """Points that lie apart: each is drawn in proportion to its squared distance from the nearest one before it."""
    draw = torch.Generator().manual_seed(seed)
    squares = products.diagonal()
    distance = torch.full_like(squares, torch.inf)  # from the nearest centre
    weights = torch.ones_like(squares)
    centres: list[int] = []
    for _ in range(count):
        unit = int(torch.multinomial(weights.cpu(), 1, generator=draw))
        centres.append(unit)
        distance = torch.minimum(distance, squares + squares[unit] - 2 * products[:, unit]).clamp_min(0)
        weights = distance.clone()
        weights[centres] = 0.0
        if not bool(weights.any()):  # all points that are left lie on centres
            weights = torch.ones_like(weights)
            weights[centres] = 0.0
    return torch.tensor(centres, device=products.device)


def _nearest(with_centres: Tensor, lengths: Tensor, products: Tensor) -> Tensor:  # (points,)
    """The nearest centre of each point, from their inner products (points, count) and the squared lengths (count,).

    A centre that is nearest to no point gets the point that is farthest from its own, of those that are not alone.
    """
    distances = lengths - 2 * with_centres  # (points, count), less each point's squared length
    nearest, labels = distances.min(1)
    nearest = nearest + products.diagonal()
    sizes = labels.bincount(minlength=len(lengths))
    for empty in (sizes == 0).nonzero()[:, 0].tolist():
        point = int(nearest.masked_fill(sizes[labels] == 1, -torch.inf).argmax())
        sizes[labels[point]] -= 1
        labels[point], sizes[empty], nearest[point] = empty, 1, 0.0
    return labels
