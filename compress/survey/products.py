"""See the inputs and outputs of a block's layers while it runs, without hooks and without knowing the block's code.

A layer's matrix product is recognised by the memory address of the weight in it. So a `Linear`, GPT-2's `Conv1D`, one
expert's slice of a fused parameter and the batched product with all of them are seen alike; a weight that is used in any
other way is not seen.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block, View
from paredown.compress.model.routing import RouterWeights
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.moments import InputStats, Need

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
_BATCHED = (torch.bmm, Tensor.bmm)


class ProductMode(TorchFunctionMode):
    """While active, calls `on_product(view, x, output, expert)` for each product with the weight of one of `views`."""

    def __init__(self, views: list[View]) -> None:
        super().__init__()
        self._views = {view.raw.data_ptr(): view for view in views}
        self._fused = {view.tensor.data_ptr() for view in views if view.expert is not None}

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        """x (..., in), output (..., out); of a batched product the view's output is `output[expert]`."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is nn.functional.linear:
            self._check(args[0], args[1] if len(args) > 1 else kwargs["weight"], output)
        elif func is torch.addmm and len(args) > 2:
            self._check(args[1], args[2], output)
        elif func in _MATMULS and isinstance(args[1], Tensor) and args[1].dim() == 2:  # x @ weight.T
            self._check(args[0], args[1], output)
        elif func in _BATCHED and len(args) > 1 and args[1].data_ptr() in self._fused:
            for expert, weight in enumerate(args[1]):  # of all experts at once
                self._check(args[0][expert], weight, output, expert)
        return output

    def _check(self, x: Tensor, weight: Tensor, output: Tensor, expert: int | None = None) -> None:
        view = self._views.get(weight.data_ptr())
        if view is not None and x.shape[-1] == view.shape[1] and x.numel():
            self.on_product(view, x, output, expert)


def routed(x: Tensor) -> Tensor:  # (rows,) bool
    """The rows of one expert's part (rows, in) of a batched product that hold a token: the others are zeros."""
    return (x != 0).any(-1)


class InputObserver(ProductMode):
    """Adds the input of each view's product to the view's InputStats. Call `next_batch` after each batch.

    Views that get the same tensor (q/k/v; gate/up) share one InputStats. With a `router` the inputs of experts are scaled
    by its weights, as the errors of their outputs are. `length` is how many tokens a window has: some blocks hand all
    windows of a batch to a layer as one. `vectors`: how wide the vectors are that a view's inputs consist of. Raises
    PareError, naming the layer, for inputs that are not finite.
    """

    def __init__(
        self,
        views: list[View],
        needs: frozenset[Need],
        device: torch.device,
        router: RouterWeights | None = None,
        length: int | None = None,
        vectors: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(views)
        self._router, self._length, self._vectors = router, length, vectors or {}
        self.stats: dict[str, InputStats] = {}  # by view name; without the views that no token reached
        self.seconds = 0.0  # time spent here
        self._needs, self._device = needs, device
        # address -> (input, its statistics), of this batch. The inputs are kept so that no address is used twice.
        self._inputs: dict[int, tuple[Tensor, InputStats]] = {}

    def next_batch(self) -> None:
        """Forget the inputs of the last batch."""
        self._inputs.clear()

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        began = perf_counter()
        if expert is not None and not bool(routed(x).any()):
            return
        known, stats = self._inputs.get(x.data_ptr()), self.stats.get(view.name)
        if known is None or known[0].shape != x.shape or (stats is not None and stats is not known[1]):
            stats = stats or InputStats(view.shape[1], self._needs, self._device, self._vectors.get(view.name, 1))
            tokens = x.detach() if expert is None else x.detach()[routed(x)]
            if self._router is not None and view.expert is not None:
                tokens = tokens.float() * self._router.of(view, len(tokens))[:, None]
            try:
                stats.update(self._windows(view, tokens))
            except PareError as error:
                raise PareError(f"{view.name}: {error}") from error
            self._inputs[x.data_ptr()] = (x, stats)
        else:
            stats = known[1]
        self.stats[view.name] = stats
        self.seconds += perf_counter() - began

    def _windows(self, view: View, tokens: Tensor) -> Tensor:  # (..., tokens, in)
        """The same inputs, window by window. An expert gets tokens of some of them, which count as one."""
        if self._length is None or tokens.dim() != 2 or view.expert is not None or len(tokens) % self._length:
            return tokens
        return tokens.view(-1, self._length, tokens.shape[-1])

    def groups(self) -> list[list[str]]:
        """Names of the views that share an input, in the order in which the block calls them."""
        by_stats: dict[int, list[str]] = {}
        for name, stats in self.stats.items():
            by_stats.setdefault(id(stats), []).append(name)
        return list(by_stats.values())


class StopForward(Exception):
    """Ends a block's forward pass once the wanted input is known."""


class Capture(ProductMode):
    """Keeps the inputs and outputs of the products of some views, by view name. A block ends where `stop` has its input."""

    def __init__(self, views: Sequence[View], stop: View | None = None) -> None:
        super().__init__([*views, *([stop] if stop else [])])
        self.inputs: dict[str, Tensor] = {}  # (..., in)
        self.outputs: dict[str, Tensor] = {}  # (..., out)
        self._stop = stop

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        self.inputs[view.name] = x
        if view is self._stop:
            raise StopForward
        self.outputs[view.name] = output.clone()  # some blocks add to it in place


def input_of(stream: Stream, block: Block, view: View, i: int) -> Tensor | None:
    """The input (..., in) of a view in batch `i`, None if no token reaches it. The block runs no further than that."""
    capture = Capture([], stop=view)
    with suppress(StopForward), capture:
        stream.output(block, i)
    return capture.inputs.get(view.name)


def run_with_capture(stream: Stream, block: Block, view: View, i: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The block's output (batch, length, hidden) for batch `i`, and the input and output of one view on the way."""
    capture = Capture([view])
    with capture:
        output = stream.output(block, i)
    return output, capture.inputs.get(view.name), capture.outputs.get(view.name)
