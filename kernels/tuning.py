"""Measure which path and tile is fastest for a product on this GPU, beside the dense product; make its table.

The dense product is cuBLAS (rocBLAS) on the same pruned weight. Weights take turns, so many that a repeat finds none of
them in the L2 cache; a repeat is one CUDA graph that multiplies with each of them once.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import product
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import lowrank as lowranks
from paredown.kernels import paths
from paredown.kernels import sparse24 as sparse24s
from paredown.kernels.dispatch import BUCKETS, Choice, DispatchTable, arch_of
from paredown.kernels.timing import Timing, interleaved

DECODE = 64  # tokens up to which kernels that read packed weights are tried
WRONG = 0.03  # relative error; that of a chain of three products in bfloat16 is below 0.01


@dataclass(frozen=True, order=True)
class Product:
    """A weight (rows, columns) of an op of `paths.PATHS`; `rank` where it has one, `density` of a bitmap."""

    op: str
    rows: int
    columns: int
    rank: int = 0
    density: float = 0.5


@dataclass(frozen=True)
class Measured:
    choice: Choice
    time: Timing
    dense: Timing


def candidates(op: str, tokens: int, device: torch.device) -> Iterator[tuple[str, dict[str, int]]]:
    """Every path and tile worth timing. Some may not run here."""
    if op in ("sparse24", "sparse24_lowrank"):
        has_mma = arch_of(device) >= 80 and tokens <= DECODE
        if has_mma:
            token_tiles = _power(math.ceil(tokens / 8))
            for row_tiles, warps, unroll in product((1, 2, 4), (4, 8, 16), (1, 2, 4)):
                # sums, what is loaded ahead, and addresses: fitted to what ptxas takes, so that nothing spills
                registers = 4 * row_tiles * token_tiles + unroll * (8 * token_tiles + 9 * row_tiles) + 56
                if registers <= min(255, 2048 // warps) and row_tiles * unroll <= 8:
                    yield "mma", {"row_tiles": row_tiles, "warps": warps, "unroll": unroll}
        # where mma.sp is there, the portable kernel rarely wins: two tiles tell
        for rows, warps, stages in ((64, 4, 1), (64, 8, 2)) if has_mma else product((32, 64, 128), (4, 8), (1, 2)):
            yield (
                "portable",
                {"rows": rows, "tokens": min(64, max(16, _power(tokens))), "warps": warps, "stages": stages},
            )
        yield "dense", {}
        if tokens > 16 and op == "sparse24" and torch.backends.cusparselt.is_available():
            yield "cusparselt", {}
    elif op == "bitmap":
        if tokens <= DECODE:
            for octets, warps in ((2, 8), (2, 16), *(((4, 4), (4, 8)) if tokens <= 8 else ())):  # others spill
                yield "portable", {"row_octets": octets, "warps": warps}
        yield "dense", {}
    else:
        if tokens <= DECODE:
            for rows, splits, warps, stages in product((32, 64), (1, 2, 4, 8), (4, 8), (3, 4)):
                if splits * max(16, _power(tokens)) <= 256:
                    yield "portable", {"up_rows": rows, "splits": splits, "warps": warps, "stages": stages}
        yield "torch", {}


@torch.no_grad()
def best(wanted: Product, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int = 20) -> Measured:
    """The fastest candidate: all are timed briefly, the best three again beside the dense product."""
    weights = _weights(wanted, device, dtype)
    x = torch.randn(tokens, wanted.columns, device=device, dtype=dtype)
    exact = F.linear(x.float(), weights[-1][1].float())
    calls: dict[tuple[str, tuple[tuple[str, int], ...]], Callable[[], object]] = {}
    for path, tile in candidates(wanted.op, tokens, device):
        choice = Choice(wanted.op, wanted.rows, wanted.columns, tokens, path, tile)
        call = _calls(choice, x, [tensors for tensors, _ in weights])
        if _is_right(choice, call, exact):
            calls[path, tuple(sorted(tile.items()))] = call
    brief = {key: interleaved({"": call}, device, 3)[""].median for key, call in calls.items()}
    finalists = sorted(brief, key=lambda key: brief[key])[:3]

    def dense() -> None:
        for _, weight in weights:
            F.linear(x, weight)

    timed = interleaved({"dense": dense, **{str(i): calls[key] for i, key in enumerate(finalists)}}, device, repeats)
    winner = min(range(len(finalists)), key=lambda i: timed[str(i)].median)
    path, items = finalists[winner]
    ratio = timed["dense"].median / timed[str(winner)].median
    choice = Choice(wanted.op, wanted.rows, wanted.columns, tokens, path, dict(items), round(ratio, 3))
    return Measured(choice, *(_each(timed[name], len(weights)) for name in (str(winner), "dense")))


def compile_ahead(work: Iterable[tuple[Product, int]], device: torch.device, dtype: torch.dtype) -> None:
    """Compile what `best` will time for these products and tokens, on all cores; Triton keeps it on disk.

    One shape stands for all of its op: most variants are the same. What fails here shows again where it is timed.
    """
    cases = {(one.op, tokens): (one, tokens, device, dtype) for one, tokens in work}
    jobs = min(8, os.cpu_count() or 1, len(cases))
    with suppress(Exception), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for waiting in [pool.submit(_run_candidates, *case) for case in cases.values()]:
            waiting.result()


@torch.no_grad()
def _run_candidates(wanted: Product, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
    tensors, dense = random_product(wanted, device, dtype)
    x = torch.randn(tokens, wanted.columns, device=device, dtype=dtype)
    exact = F.linear(x.float(), dense.float())
    warnings.simplefilter("ignore")
    for path, tile in candidates(wanted.op, tokens, device):
        choice = Choice(wanted.op, wanted.rows, wanted.columns, tokens, path, tile)
        _is_right(choice, _calls(choice, x, [tensors]), exact)


def tune(
    wanted: Iterable[Product], device: torch.device, dtype: torch.dtype, buckets: Sequence[int] = BUCKETS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> DispatchTable:  # fmt: skip
    """A measured table of this device for these products."""
    import triton

    work = [(one, tokens) for one in sorted(set(wanted)) for tokens in buckets]
    progress(0, len(work))
    compile_ahead(work, device, dtype)
    choices = []
    for done, (one, tokens) in enumerate(work, start=1):
        choices.append(best(one, tokens, device, dtype).choice)
        progress(done, len(work))
    versions = {"torch": str(torch.__version__), "triton": str(triton.__version__)}
    name = torch.cuda.get_device_name(device)
    return DispatchTable(name, arch_of(device), "measured", tuple(choices), versions, date.today().isoformat())


def random_product(wanted: Product, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """The op's tensors of a random weight, as `paths.PATHS` takes them, and the dense weight."""
    rows, columns, rank = wanted.rows, wanted.columns, wanted.rank
    weight = (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)
    left = (torch.randn(rows, max(rank, 1), device=device) / max(rank, 1) ** 0.5).to(dtype)
    right = (torch.randn(max(rank, 1), columns, device=device) / columns**0.5).to(dtype)
    if wanted.op in ("sparse24", "sparse24_lowrank"):
        keep = torch.rand(rows, columns // 4, 4, device=device).argsort(-1).argsort(-1).lt(2).reshape(rows, columns)
        packed = sparse24s.pack24(weight, keep)
        if wanted.op == "sparse24":
            return packed, weight * keep
        return (*packed, left, right), weight * keep + left @ right
    if wanted.op == "bitmap":
        keep = torch.rand(rows, columns, device=device) < wanted.density
        values, bitmap = bitmaps.pack_bitmap(weight, keep)
        return (values, bitmap, bitmaps.row_starts(bitmap)), weight * keep
    if wanted.op == "lowrank":
        return (left, right, [rank], [rows]), lowranks.lowrank_dense(left, right)
    if wanted.op == "pifa":
        order = torch.randperm(rows, device=device).int()
        coefficients = left[rank:].clone()
        return (right, coefficients, order, [rank], [rows]), lowranks.pifa_dense(right, coefficients, order)
    link = (torch.randn(rank, rank, device=device) / rank**0.5).to(dtype)
    return (left, link, right), lowranks.cur_dense(left, link, right)


def _weights(wanted: Product, device: torch.device, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Copies of one weight, packed and dense: together four times the L2 cache and more, and so many that launching
    their graph, which is timed with it, counts for little."""
    tensors, dense = random_product(wanted, device, dtype)
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    copies = max(8, math.ceil(4 * torch.cuda.get_device_properties(device).L2_cache_size / size))
    return [
        (tuple(t.clone() if isinstance(t, Tensor) else t for t in tensors), dense.clone())
        for _ in range(min(copies, 64))
    ]


def _calls(choice: Choice, x: Tensor, weights: list[tuple[Any, ...]]) -> Callable[[], Tensor]:
    """Multiplies with each weight once and returns the last product."""
    y = x.new_empty(len(x), choice.rows)

    def call() -> Tensor:
        for tensors in weights:
            last = paths.PATHS[choice.op](choice, x, tensors, None, y)
        return last

    return call


def _is_right(choice: Choice, call: Callable[[], Tensor], exact: Tensor) -> bool:
    """Whether a candidate runs here (a tile may need more shared memory than there is, a library or the compiler may
    refuse it) and multiplies right: a table must not hold what is fast and wrong."""
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    try:
        error = float((call().float() - exact).norm() / exact.norm())
    except OutOfResources:
        return False
    except (RuntimeError, TritonError) as fault:
        warnings.warn(f"left out, because it fails here: {choice} ({fault})", stacklevel=2)
        return False
    if not error < WRONG:  # nor if it is NaN
        warnings.warn(f"left out, because its result is wrong by {error:.1%}: {choice}", stacklevel=2)
    return error < WRONG


def _each(time: Timing, count: int) -> Timing:
    return Timing(time.median / count, time.low / count, time.high / count, time.graph)


def _power(tokens: int) -> int:
    return 1 << (tokens - 1).bit_length()
