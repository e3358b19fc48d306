"""The parts of a block that add to its residual stream, found by trying: attention, which mixes tokens, and MLPs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block
from paredown.compress.model.caches import check_caches
from paredown.compress.model.removal import check_removable
from paredown.compress.model.reshape_names import list_of_blocks
from paredown.compress.model.stream import Stream, start

PROBE = 16  # tokens that they are found with
MIXED = 0.05  # of what a module gives for a token: what another token changes in it, and rounding does not


@dataclass(frozen=True)
class Sublayer:
    """A module of a block without whose output the block goes on."""

    name: str  # in full: model.layers.0.self_attn
    block: int
    mixes: bool  # tokens, as attention does
    numbers: int  # parameters


@contextmanager
def silent(block: Block, names: Sequence[str]) -> Iterator[None]:
    """Inside the `with` block these modules of a block, by full name, give zeros."""
    with ExitStack() as stack:
        for name in names:
            module = block.module.get_submodule(name.removeprefix(block.prefix))
            stack.callback(module.register_forward_hook(_zeros).remove)
        yield


def find_sublayers(source: ModelSource, all_blocks: Sequence[Block]) -> list[Sublayer]:
    """Those of all blocks that can go, in order: not the attention of the first block, whose cache tells the text's length.

    They are found in the first block of each kind: blocks of the same shapes are alike. Raises PareError if there are none,
    and as `check_removable` does.
    """
    check_removable(source, all_blocks)
    ids = torch.arange(min(PROBE, int(source.config.get_text_config().vocab_size)))[None]
    stream, found = start(source, ids), list[Sublayer]()
    kinds: dict[Any, dict[str, bool]] = {}
    for block in all_blocks:
        kind = tuple((name, tensor.shape) for name, tensor in block.module.state_dict().items())
        if kind not in kinds:
            with source.loaded(block):
                kinds[kind] = sublayers(stream, block)
        for path, mixes in kinds[kind].items():
            sublayer = Sublayer(block.prefix + path, block.index, mixes, _numbers(block.module.get_submodule(path)))
            if not (mixes and block.index == 0) and _uncached(source, sublayer.name):
                found.append(sublayer)
    if not found:
        raise PareError(
            f"no block of this {source.family} model has attention or an MLP that could be left out: that is simply added to "
            "its residual stream, and whose cache nothing else needs. Remove whole blocks (greedy_depth), or units "
            "(paredown_width)."
        )
    return found


@torch.no_grad()
def sublayers(stream: Stream, block: Block) -> dict[str, bool]:
    """By name within a block, whose weights are in memory: its sublayers, and whether each mixes tokens. {} if it has none.

    Trials on the first batch of the stream: without all of them the block hands on its input, with one alone it does not, and
    no other one needs it.
    """
    x = stream.hidden[0].to(stream.device)  # (batch, length, hidden)
    whole = _Run.of(stream, block, x)
    paths = [path for path, given in whole.given.items() if given.numel() == x.numel()]
    if not paths or not _same(_Run.of(stream, block, x, paths).output, x):
        return {}
    other = x.clone()
    other[:, 0] = x[:, -1].flip(-1)  # a padding token is all zeros
    found: dict[str, bool] = {}
    for path in paths:
        others = [p for p in paths if p != path]
        alone = _Run.of(stream, block, x, others)
        needed = bool(others) and _same(_Run.of(stream, block, x, [path]).output, x)
        if needed or _same(alone.output, x) or next(block.module.get_submodule(path).children(), None) is None:
            continue
        changed = _Run.of(stream, block, other, others).given[path] - alone.given[path]
        rows = (y.reshape(*x.shape[:2], -1)[:, 1:].norm(dim=-1) for y in (changed, alone.given[path]))
        found[path] = bool((next(rows) > MIXED * next(rows)).any())
    return found


@dataclass
class _Run:
    """One run of a block on hidden states: its output, and what its own modules with matrices gave, float32."""

    output: Tensor
    given: dict[str, Tensor]  # by name within the block

    @classmethod
    def of(cls, stream: Stream, block: Block, hidden: Tensor, without: Sequence[str] = ()) -> "_Run":
        """The run in which the modules `without` give zeros."""
        given: dict[str, Tensor] = {}

        def keep(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                first = output[0] if isinstance(output, tuple | list) else output
                given[path] = first.float()

            return hook

        with silent(block, [block.prefix + path for path in without]), ExitStack() as stack:
            for path, module in block.module.named_children():
                if any(weight.dim() > 1 for weight in module.parameters()):
                    stack.callback(module.register_forward_hook(keep(path)).remove)
            return cls(stream.call(block, 0, hidden.clone()), given)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a.float() - b.float()).norm() <= 4 * torch.finfo(a.dtype).eps * b.float().norm())


def _zeros(module: nn.Module, args: Any, output: Any) -> Any:
    """A forward hook: zeros for what the module gives."""
    if isinstance(output, tuple | list):
        return type(output)((torch.zeros_like(output[0]), *output[1:]))
    return torch.zeros_like(output)


def _numbers(module: nn.Module) -> int:
    return sum(t.numel() for t in module.parameters())


def _uncached(source: ModelSource, name: str) -> bool:
    """Whether no cache is read that this module alone fills."""
    try:
        check_caches(source.config, source.model, list_of_blocks(source), [name])
    except PareError:
        return False
    return True
