"""Router weights: how much of an expert's output for a token counts in the mixture's."""

import inspect
from collections.abc import Sequence
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import View

# what transformers' classes of fused experts take: tokens (tokens, hidden), and of each its experts and their weights
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def is_told_weights(module: nn.Module) -> bool:
    """Whether a module of experts is called with the router's weights, under the names that nearly all families use."""
    return set(ARGUMENTS) <= inspect.signature(module.forward).parameters.keys()


class RouterWeights:
    """Inside a `with` block, keeps the router's choice of each module of experts from its last call."""

    def __init__(self, views: Sequence[View]) -> None:
        self._modules = {id(view.module): view.module for view in views if view.expert is not None}
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}  # index and weights (tokens, experts of a token)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "RouterWeights":
        for module in self._modules.values():
            signature = inspect.signature(module.forward)
            hook = partial(self._called, signature)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()

    def of(self, view: View, rows: int) -> Tensor:
        """Of the `rows` tokens that an expert is given, in its order: how much its output for each counts (rows,), float32.

        Raises PareError if the router chose it for another number of tokens.
        """
        assert view.expert is not None
        index, weights = self._chosen[id(view.module)]
        chosen = index.T.eq(view.expert)  # by place among a token's experts, then by token
        found = weights.T[chosen].detach().float()
        if len(found) != rows:
            raise PareError(
                f"{view.name}: it was given {rows} tokens, and the router chose it for {len(found)}, so that their weights "
                "are not known. Leave router_weight out."
            )
        return found

    def _called(self, signature: inspect.Signature, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        index, weights = (given[name].reshape(-1, given[name].shape[-1]) for name in ARGUMENTS[1:])
        self._chosen[id(module)] = index, weights
