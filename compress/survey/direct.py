"""What a change of a layer costs, token by token: E[(g . (y - y'))^2] / 2, in nats per token.

y is the layer's output, y' what it would give instead, and g the gradient of the loss at y. That is the rise of the loss to
second order, where the Hessian is the gradients' own second moment. Each token's error meets its own gradient; a product of
averages over tokens, as in K-FAC, prices a token with huge activations and a small gradient (an attention sink) far too high.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor

from paredown.compress.model.blocks import View

MOST_TOKENS = 16384  # of which a layer's inputs and gradients are held at once
FEWEST = 32  # of a batch, such as the few that reach an expert
AT_ONCE = 2048  # tokens in one product

Layer = Callable[[Tensor], Tensor]  # (tokens, in) -> (tokens, out), float32
Batches = Sequence[tuple[Tensor, Tensor]]  # inputs of a layer (tokens, in), and gradients at its output (tokens, out)


def rises(layer: Layer, changed: Iterable[Layer], batches: Batches) -> Iterator[float]:
    """Of each of the layers in `changed`, in turn: E[(g . (y - y'))^2] / 2, the mean over all tokens.

    The gradients are those of the summed loss at the outputs of `layer`.
    """
    whole = _along(layer, batches)
    for other in changed:
        yield float((whole - _along(other, batches)).square().mean()) / 2


def _along(layer: Layer, batches: Batches) -> Tensor:  # (tokens,)
    """g . y of each token, float64."""
    parts = (zip(x.split(AT_ONCE), g.split(AT_ONCE), strict=True) for x, g in batches)
    return torch.cat([(layer(x.float()) * g.float()).sum(1, dtype=torch.float64) for x, g in chain(*parts)])


class Pairs:
    """Inputs of layers, and the gradients at their outputs, of tokens drawn at random where there are more than `most`.

    `add` is what `gradients.backward` tells of; `take` gives a layer's away.
    """

    def __init__(self, tokens: int, most: int | None = None) -> None:
        """tokens: of the whole text; most: of those that are held, by default MOST_TOKENS."""
        self._share = min((most or MOST_TOKENS) / tokens, 1.0)
        self._held: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._draw = torch.Generator().manual_seed(0)

    def add(self, view: View, x: Tensor, gradient: Tensor) -> None:
        """x (tokens, in), gradient (tokens, out)."""
        if self._share < 1:
            count = max(round(self._share * len(x)), FEWEST)
            drawn = torch.randperm(len(x), generator=self._draw)[:count].to(x.device)
            x, gradient = x[drawn], gradient[drawn]
        self._held.setdefault(view.name, []).append((x, gradient))

    def take(self, name: str) -> Batches:
        """Those of one layer, in the model's dtype; [] if no token reached it."""
        return self._held.pop(name, [])

    @staticmethod
    def bytes(shape: tuple[int, int], tokens: int, element: int) -> int:
        """Of one layer with a weight of this shape (out, in) and `element` bytes a number, and of a product in `rises`."""
        return sum(shape) * (element * min(tokens, MOST_TOKENS) + 8 * AT_ONCE)
