"""What tensors are called once blocks are removed: in the model, and in the files of its checkpoint."""

from collections.abc import Iterable, Iterator, Sequence

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks


def list_of_blocks(source: ModelSource) -> str:
    """The name of the list of blocks: model.layers"""
    return blocks(source)[0].name.rpartition(".")[0]


def heads_in_files(source: ModelSource) -> tuple[str, ...]:
    """What stands before a block's number in names in the files: `transformer.h`, `model.layers`."""
    keys = list(_keys(source))
    found: dict[str, set[int]] = {}
    for index, key in keys:
        for head in _before(key, str(index)):
            found.setdefault(head, set()).add(index)
    whole = [head for head, numbers in found.items() if numbers == {index for index, _ in keys}]
    return tuple(h for h in whole if not any(h.startswith(f"{shorter}.") for shorter in whole))


def check_numbered(source: ModelSource, heads: Iterable[str]) -> None:
    """Raises PareError if the files hold a part of a block under a name without the block's number after one of `heads`."""
    for index, key in _keys(source):
        if not any(key.startswith(f"{head}.{index}.") for head in heads):
            raise PareError(
                f"{source.id}: its files hold a part of block {index} as {key!r}, which does not have the block's number "
                "where the others have it, so that what remains cannot be named."
            )


def renumbered(name: str, heads: Iterable[str], kept: Sequence[int]) -> str | None:
    """A name with the number that its block has among those `kept`; None if it is of another block."""
    if (place := _place(name, heads)) is None:
        return name
    head, index, rest = place
    return f"{head}.{kept.index(index)}.{rest}" if index in kept else None


def is_extra(key: str, heads: Iterable[str], count: int) -> bool:
    """Whether a tensor that the class does not know is of a layer that reads the last of `count` blocks."""
    place = _place(key, heads)
    return place[1] >= count if place else any(part.startswith("mtp") for part in key.split("."))


def _keys(source: ModelSource) -> Iterator[tuple[int, str]]:
    """The names in the files of all that blocks hold, each with the number of its block."""
    for block in blocks(source):
        names = [block.prefix + name for name in block.names]
        yield from ((block.index, key) for n in names if n in source.parameters for key in source.origins[n].keys)


def _before(key: str, part: str) -> Iterator[str]:
    parts = key.split(".")
    return (".".join(parts[:i]) for i, own in enumerate(parts) if i and own == part)


def _place(name: str, heads: Iterable[str]) -> tuple[str, int, str] | None:
    """A name as what stands before a block's number, that number, and the rest; None outside the blocks."""
    for head in heads:
        number, _, rest = name.removeprefix(f"{head}.").partition(".")
        if name.startswith(f"{head}.") and number.isdecimal():
            return head, int(number), rest
    return None
