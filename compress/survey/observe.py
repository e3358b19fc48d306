"""Watch every layer's matrix product while a block runs, without hooks and without knowing the block's code.

Products are recognised by the address of their weight: a `Linear`, GPT-2's `Conv1D` and one expert's slice of a fused
3-D parameter all look alike, and a weight that is used in any other way is found out by never being seen.
"""

from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import View
from paredown.compress.numerics.moments import InputStats

_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class Watcher(TorchFunctionMode):
    """While active, calls `note(view, x, out)` for each product of a view's weight: x (..., in), out (..., out)."""

    def __init__(self, views: list[View]) -> None:
        super().__init__()
        self._views = {view.raw.data_ptr(): view for view in views}

    def note(self, view: View, x: Tensor, out: Tensor) -> None:
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is nn.functional.linear:
            self._noted(args[0], args[1] if len(args) > 1 else kwargs["weight"], out)
        elif func is torch.addmm and len(args) > 2:
            self._noted(args[1], args[2], out)
        elif func in _MATMULS and isinstance(args[1], Tensor) and args[1].dim() == 2:  # x @ weight.T
            self._noted(args[0], args[1], out)
        return out

    def _noted(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        view = self._views.get(weight.data_ptr())
        if view is not None and x.shape[-1] == view.shape[1] and x.numel():
            self.note(view, x, out)


class Observer(Watcher):
    """Feeds the input of each view's product to its InputStats. Call `next_batch` between batches.

    Views that are given the same tensor (q/k/v; gate/up) share one InputStats.
    """

    def __init__(self, views: list[View], needs: frozenset[str], device: torch.device) -> None:
        super().__init__(views)
        self.stats: dict[str, InputStats] = {}  # by view name; views that no token reached are missing
        self.seconds = 0.0
        self._needs, self._device = needs, device
        # inputs of the running batch, held so that no address is reused: address -> (input, its statistics)
        self._seen: dict[int, tuple[Tensor, InputStats]] = {}

    def next_batch(self) -> None:
        self._seen.clear()

    def note(self, view: View, x: Tensor, out: Tensor) -> None:
        began = perf_counter()
        seen, mine = self._seen.get(x.data_ptr()), self.stats.get(view.name)
        if seen is None or seen[0].shape != x.shape or (mine is not None and mine is not seen[1]):
            mine = mine or InputStats(view.shape[1], self._needs, self._device)
            try:
                mine.update(x.detach())
            except PareError as fault:
                raise PareError(f"{view.name}: {fault}") from fault
            self._seen[x.data_ptr()] = (x, mine)
        else:
            mine = seen[1]
        self.stats[view.name] = mine
        self.seconds += perf_counter() - began

    def groups(self) -> list[list[str]]:
        """Names of the views that share an input, in the order in which the block calls them."""
        found: dict[int, list[str]] = {}
        for name, stats in self.stats.items():
            found.setdefault(id(stats), []).append(name)
        return list(found.values())


class Reached(Exception):
    """Every input that was waited for has been seen."""


class Catcher(Watcher):
    """Keeps the input of one view and stops the block as soon as it is there; or goes on and keeps the output too."""

    def __init__(self, view: View, stop: bool = True) -> None:
        super().__init__([view])
        self.found: Tensor | None = None
        self.made: Tensor | None = None
        self._stop = stop

    def note(self, view: View, x: Tensor, out: Tensor) -> None:
        self.found = x
        if self._stop:
            raise Reached
        self.made = out.clone()  # some blocks add to it in place
