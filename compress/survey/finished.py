"""Parts of a block that do not change any more: what they gave is kept, batch by batch, and later passes do not run them.

What a part is given must not change either: a pass keeps and takes nothing behind the first layer that is still to be edited.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.model.blocks import Block, View
from paredown.compress.model.stream import Stream
from paredown.compress.survey.products import ProductMode

Call = tuple[int, int]  # batch, and which call of it


class Finished:
    """Outputs of the largest modules of a block in which no layer is edited any more, at most `room` bytes of them.

    `views` are still to be edited, and their products are seen; the block's other layers stay as they are. Where blocks hand
    on more than hidden states a module may do more than give an output: there only layers themselves are kept. Only passes
    within `batch` are looked at. `close` leaves the modules as they were.
    """

    def __init__(self, stream: Stream, block: Block, views: Sequence[View], room: int) -> None:
        self._block, self._room = block, room
        own = {view.name: view for view in block.views()}
        layers = {self._path(view) for view in own.values()}
        single = stream.hands_on
        self._inside: dict[str, set[str]] = {}  # layers of a module
        for path, module in block.module.named_modules() if room else ():
            found = {layer for layer in layers if f"{layer}.".startswith(f"{path}.")}
            if path and (path in layers if single else found) and not isinstance(module, nn.ModuleList | nn.ModuleDict):
                self._inside[path] = found
        self._open = {view.name: own[view.name] for view in views if room}
        self._parts: dict[str, _Part] = {}
        self._batch: int | None = None
        self.add([])

    @contextmanager
    def batch(self, i: int) -> Iterator[None]:
        """Inside, batch `i` goes through the block."""
        self._batch = i
        for part in self._parts.values():
            part.calls = 0
        try:
            with _Watch(list(self._open.values()), self.stop) if self._open else nullcontext():
                yield
        finally:
            self.stop()

    def stop(self) -> None:
        """From here on a pass is as any other."""
        self._batch = None

    def add(self, views: Sequence[View]) -> None:
        """These have been edited."""
        for view in views:
            self._open.pop(view.name, None)
        waiting = set(map(self._path, self._open.values()))
        for path, layers in self._inside.items():
            if path not in self._parts and waiting.isdisjoint(layers):
                self._parts[path] = _Part(self._block.module.get_submodule(path), self._run(path))

    def close(self) -> None:
        for part in self._parts.values():
            part.close()
        self._parts.clear()

    def _path(self, view: View) -> str:
        """Of the view's module within the block."""
        name = view.name if view.expert is None else view.owner.rpartition(".")[0]
        return name.removeprefix(self._block.prefix)

    def _run(self, path: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            part, batch = self._parts[path], self._batch
            if batch is None:
                return part.forward(*args, **kwargs)
            call = batch, part.calls
            part.calls += 1
            if call in part.kept:
                return _copy(part.kept[call])
            output = part.forward(*args, **kwargs)
            inner = [other for name, other in self._parts.items() if name.startswith(f"{path}.")]  # not asked again
            room = self._room + sum(other.held(batch) for other in inner)
            if (size := _bytes(output)) is not None and size <= room:
                for other in inner:
                    other.forget(batch)
                part.kept[call] = _copy(output)
                self._room = room - size
            return output

        return run


class _Watch(ProductMode):
    """Calls `stop` after a product with one of the views."""

    def __init__(self, views: list[View], stop: Callable[[], None]) -> None:
        super().__init__(views)
        self._stop = stop

    def on_product(self, view: View, x: Tensor, output: Tensor, expert: int | None = None) -> None:
        self._stop()


class _Part:
    """A module that runs through `forward` given here; `forward` of the part is the module's own."""

    def __init__(self, module: nn.Module, run: Callable[..., Any]) -> None:
        self.module, self.forward = module, module.forward
        self.own = "forward" in vars(module)
        self.kept: dict[Call, Any] = {}
        self.calls = 0
        module.forward = run

    def held(self, batch: int) -> int:
        """How many bytes are kept of a batch."""
        return sum(_bytes(output) or 0 for (i, _), output in self.kept.items() if i == batch)

    def forget(self, batch: int) -> None:
        self.kept = {call: output for call, output in self.kept.items() if call[0] != batch}

    def close(self) -> None:
        if self.own:
            self.module.forward = self.forward
        else:
            del self.module.forward
        self.kept.clear()


def _copy(output: Any) -> Any:
    """Some blocks add to what a module gives in place."""
    if isinstance(output, tuple):
        return tuple(map(_copy, output))
    return output.detach().clone() if isinstance(output, Tensor) else output


def _bytes(output: Any) -> int | None:
    """Of a tensor, or a tuple of such; None for anything else, which is not kept."""
    parts = output if isinstance(output, tuple) else (output,)
    if not all(part is None or type(part) is torch.Tensor for part in parts):
        return None
    sizes: list[int] = [part.nbytes for part in parts if part is not None]
    return sum(sizes)
