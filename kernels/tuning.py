"""Measure which path and tile is fastest for a product on this GPU, compare it with the dense product, write a table.

The dense product is cuBLAS (rocBLAS) with the same pruned weight. Several copies of the weight take turns: so many that
the next repeat does not find a copy in the L2 cache. A repeat multiplies with each copy once: up to DECODE tokens in one CUDA
graph; more are launched from Python, as prefill is, where some paths cost more time than on the GPU.
"""

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
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
from paredown.kernels.timing import Call, Timing, interleaved, l2_bytes

# (row_tiles, warps, row_warps, unroll) of the `mma.sp` kernel by the tiles of 8 tokens that a program takes
MMA_TILES = {
    1: (
        (1, 2, 1, 1), (1, 4, 1, 1), (1, 8, 1, 1), (1, 16, 1, 1), (1, 2, 1, 2), (1, 4, 1, 2), (2, 2, 1, 1), (2, 4, 1, 1),
        (2, 8, 1, 1),
    ),
    2: ((1, 2, 1, 1), (1, 4, 1, 1), (1, 8, 1, 1), (2, 2, 1, 1), (2, 4, 1, 1), (2, 8, 1, 1), (2, 4, 2, 1)),
    4: ((1, 4, 1, 1), (1, 8, 1, 1), (1, 4, 2, 1), (2, 4, 1, 1), (2, 8, 1, 1), (2, 4, 2, 1), (2, 4, 4, 1)),
    8: ((1, 4, 1, 1), (1, 8, 1, 1), (1, 8, 2, 1), (1, 4, 4, 1), (2, 4, 1, 1), (2, 8, 2, 1), (2, 4, 2, 1), (2, 4, 4, 1)),
}  # fmt: skip
DECODE = 64  # kernels that read packed weights are tried up to this number of tokens
COMPILING = 3 << 30  # bytes of the GPU for a process that compiles: its context, and one weight as it is made
WRONG = 0.03  # relative error of a wrong result; three products in a row in bfloat16 stay below 0.01

Timer = Callable[[Mapping[str, Call], int], Mapping[str, Timing]]  # calls by name, repeats -> times by name


@dataclass(frozen=True, order=True)
class Product:
    """A product with a weight (rows, columns). `op` is a key of `paths.PATHS`.

    `rank`: of the factors, in the ops that have them. `density`: the share of weights that a bitmap keeps.
    """

    op: str
    rows: int
    columns: int
    rank: int = 0
    density: float = 0.5


@dataclass(frozen=True)
class Measurement:
    """The fastest choice, its time and the time of the dense product. Times are those of one product."""

    choice: Choice
    time: Timing
    dense: Timing


def candidates(op: str, tokens: int, arch: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Every path and tile worth timing on an architecture (`dispatch.arch_of`). Some may not run on this device."""
    if op in ("sparse24", "sparse24_lowrank"):
        has_mma = arch >= 80 and tokens <= DECODE
        if has_mma:
            for row_tiles, warps, row_warps, unroll in MMA_TILES[_power(math.ceil(tokens / 8))]:
                yield "mma", {"row_tiles": row_tiles, "warps": warps, "row_warps": row_warps, "unroll": unroll}
        # the portable kernel rarely beats mma.sp: two tiles are enough to find out
        for rows, warps, stages in (
            ((64, 4, 1), (64, 8, 2)) if has_mma else itertools.product((32, 64, 128), (4, 8), (1, 2))
        ):
            yield (
                "portable",
                {"rows": rows, "tokens": min(64, max(16, _power(tokens))), "warps": warps, "stages": stages},
            )
        yield "dense", {}
        if tokens > DECODE and op == "sparse24" and torch.backends.cusparselt.is_available():
            yield "cusparselt", {}
    elif op == "bitmap":
        if tokens <= DECODE:
            for octets, warps in ((2, 8), (2, 16), *(((4, 4), (4, 8)) if tokens <= 8 else ())):  # other tiles spill
                yield "portable", {"row_octets": octets, "warps": warps}
        yield "dense", {}
    else:
        if tokens <= DECODE:
            for ranks, splits, rows, stages in itertools.product((16, 32), (1, 2, 4), (16, 32), (4, 6)):
                if splits * max(16, _power(tokens)) <= 256:
                    yield "portable", {"down_ranks": ranks, "splits": splits, "up_rows": rows, "stages": stages}
        yield "torch", {}


@torch.no_grad()
def best(product: Product, tokens: int, device: torch.device, dtype: torch.dtype, repeats: int = 20) -> Measurement:
    """The fastest candidate for this product with `tokens` tokens, and how it compares with the dense product."""
    weights = _copies(product, device, dtype)
    x = torch.randn(tokens, product.columns, device=device, dtype=dtype)
    exact = F.linear(x.float(), weights[-1][1].float())
    trials = list(_trials(product, x, [tensors for tensors, _ in weights], exact))

    def dense() -> None:
        for _, weight in weights:
            F.linear(x, weight)

    def timer(calls: Mapping[str, Call], repeats: int) -> Mapping[str, Timing]:
        return interleaved(calls, device, repeats, graphs=tokens <= DECODE)

    return fastest(trials, dense, len(weights), repeats, timer)


def fastest(
    trials: Sequence[tuple[Choice, Call]], dense: Call, products: int, repeats: int, timer: Timer
) -> Measurement:
    """The fastest of `trials`: each is timed 3 times alone, then the best three `repeats` times, in turn with `dense`.

    `products`: how many products one call computes.
    """
    medians = [timer({"": call}, 3)[""].median for _, call in trials]
    finalists = [trials[i] for i in sorted(range(len(trials)), key=lambda i: medians[i])[:3]]
    times = timer({"dense": dense, **{str(i): call for i, (_, call) in enumerate(finalists)}}, repeats)
    winner = min(range(len(finalists)), key=lambda i: times[str(i)].median)
    choice, time = finalists[winner][0], times[str(winner)]
    ratio = round(times["dense"].median / time.median, 3)
    choice = replace(choice, tile=dict(sorted(choice.tile.items())), ratio=ratio)
    return Measurement(choice, _per_product(time, products), _per_product(times["dense"], products))


def compile_ahead(work: Iterable[tuple[Product, int]], device: torch.device, dtype: torch.dtype) -> None:
    """Compile, on all cores, the kernels that `best` will time for these products and tokens; Triton caches them on disk.

    Only one shape of each op is compiled: most of its variants serve all shapes. Errors are ignored: `best` meets them
    again.
    """
    cases = {(product.op, tokens): (product, tokens, device, dtype) for product, tokens in work}
    fitting = torch.cuda.mem_get_info(device)[0] // COMPILING
    jobs = max(1, min(16, os.cpu_count() or 1, fitting))
    parts = math.ceil(2 * jobs / max(len(cases), 1))
    with suppress(Exception), ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(_run_candidates, *case, i, parts) for case in cases.values() for i in range(parts)]:
            future.result()


@torch.no_grad()
def _run_candidates(
    product: Product, tokens: int, device: torch.device, dtype: torch.dtype, part: int, parts: int
) -> None:
    tensors, dense = random_product(product, device, dtype)
    x = torch.randn(tokens, product.columns, device=device, dtype=dtype)
    exact = F.linear(x.float(), dense.float())
    warnings.simplefilter("ignore")
    for _ in _trials(product, x, [tensors], exact, part, parts):
        pass


def _trials(
    product: Product, x: Tensor, weights: list[tuple[Any, ...]], exact: Tensor, part: int = 0, parts: int = 1
) -> Iterator[tuple[Choice, Callable[[], Tensor]]]:
    """The candidates that run on the device of x and are right, each with its call. Of `parts` parts of them only one."""
    from paredown.kernels import sparse24_cusparselt

    tried = list(candidates(product.op, len(x), arch_of(x.device)))[part::parts]
    if ("cusparselt", {}) in tried:
        with suppress(RuntimeError):  # not every size is searched by every version: its own choice remains
            tried.append(("cusparselt", sparse24_cusparselt.searched(x, *weights[0])))
    for path, tile in tried:
        choice = Choice(product.op, product.rows, product.columns, len(x), path, tile)
        call = _call(choice, x, weights)
        if is_right(choice, call, exact):
            yield choice, call


def tune(
    products: Iterable[Product], device: torch.device, dtype: torch.dtype, buckets: Sequence[int] = BUCKETS,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> DispatchTable:  # fmt: skip
    """A measured table of this device for these products. `progress` is called with the steps done and their number."""
    import triton

    work = [(product, tokens) for product in sorted(set(products)) for tokens in buckets]
    progress(0, len(work))
    compile_ahead(work, device, dtype)
    choices = []
    for done, (product, tokens) in enumerate(work, start=1):
        choices.append(best(product, tokens, device, dtype).choice)
        progress(done, len(work))
    versions = {"torch": str(torch.__version__), "triton": str(triton.__version__)}
    name = torch.cuda.get_device_name(device)
    return DispatchTable(name, arch_of(device), "measured", tuple(choices), versions, date.today().isoformat())


def random_product(product: Product, device: torch.device, dtype: torch.dtype) -> tuple[tuple[Any, ...], Tensor]:
    """A random weight: the tensors that the function of `paths.PATHS` takes, and the dense weight (rows, columns)."""
    rows, columns, rank = product.rows, product.columns, product.rank
    weight = (torch.randn(rows, columns, device=device) / columns**0.5).to(dtype)
    left = (torch.randn(rows, max(rank, 1), device=device) / max(rank, 1) ** 0.5).to(dtype)
    right = (torch.randn(max(rank, 1), columns, device=device) / columns**0.5).to(dtype)
    if product.op in ("sparse24", "sparse24_lowrank"):
        keep = torch.rand(rows, columns // 4, 4, device=device).argsort(-1).argsort(-1).lt(2).reshape(rows, columns)
        packed = sparse24s.pack24(weight, keep)
        if product.op == "sparse24":
            return packed, weight * keep
        return (*packed, left, right), weight * keep + left @ right
    if product.op == "bitmap":
        keep = torch.rand(rows, columns, device=device) < product.density
        values, bitmap = bitmaps.pack_bitmap(weight, keep)
        return (values, bitmap, bitmaps.row_starts(bitmap)), weight * keep
    if product.op == "lowrank":
        return (left, right, [rank], [rows]), lowranks.lowrank_dense(left, right)
    if product.op == "pifa":
        order = torch.randperm(rows, device=device).int()
        coefficients = left[rank:].clone()
        return (right, coefficients, order, [rank], [rows]), lowranks.pifa_dense(right, coefficients, order)
    link = (torch.randn(rank, rank, device=device) / rank**0.5).to(dtype)
    return (left, link, right), lowranks.cur_dense(left, link, right)


def _copies(product: Product, device: torch.device, dtype: torch.dtype) -> list[tuple[tuple[Any, ...], Tensor]]:
    """8 to 64 copies of one weight, packed and dense: if 64 suffice, at least four times the L2 cache.

    With this many, the launch of their graph, which is timed as well, counts for little.
    """
    tensors, dense = random_product(product, device, dtype)
    size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    copies = max(8, math.ceil(4 * l2_bytes(device) / size))
    return [
        (tuple(t.clone() if isinstance(t, Tensor) else t for t in tensors), dense.clone())
        for _ in range(min(copies, 64))
    ]


def _call(choice: Choice, x: Tensor, weights: list[tuple[Any, ...]]) -> Callable[[], Tensor]:
    """A call that multiplies x with each weight once and returns the last product."""
    y = x.new_empty(len(x), choice.rows)

    def call() -> Tensor:
        for tensors in weights:
            last = paths.PATHS[choice.op](choice, x, tensors, None, y)
        return last

    return call


def is_right(choice: Choice, call: Callable[[], Tensor], exact: Tensor) -> bool:
    """Whether a candidate runs on this device and its product is close to `exact`: no table may hold a wrong kernel.

    A tile that needs more shared memory than the device has is left out silently. Other errors, and results with a
    relative error of WRONG or more, give a warning.
    """
    from triton.errors import TritonError
    from triton.runtime.errors import OutOfResources

    try:
        error = float((call().float() - exact).norm() / exact.norm())
    except OutOfResources:
        return False
    except (RuntimeError, TritonError) as failure:
        warnings.warn(f"left out, because it fails here: {choice} ({failure})", stacklevel=2)
        return False
    if not error < WRONG:  # also true for NaN
        warnings.warn(f"left out, because its result is wrong by {error:.1%}: {choice}", stacklevel=2)
    return error < WRONG


def _per_product(time: Timing, products: int) -> Timing:
    return Timing(time.median / products, time.low / products, time.high / products, time.graph)


def _power(tokens: int) -> int:
    """The smallest power of 2 that is at least `tokens`."""
    return 1 << (tokens - 1).bit_length()
