"""Are the kernels right on this GPU? One command, nothing to prepare.

    python -m paredown.kernels.selftest [--small] [--sanitize] [--jobs 8]

Tests small shapes first, then those of Llama-3-8B, Qwen3-4B and Llama-3.2-1B. Each shape runs every kernel and path, and
the operators with the tiles from this device's table, in bfloat16 and float16, with and without bias, for 1 to 300 tokens.
The result is compared with the float64 product of the unpacked weight by relative Frobenius error. Outputs are filled
with NaN before each launch, and a second launch must give the same bits. SparseGPT's sweep is compared with the plain loop
in float64 under the mask that it chose, which must be the loop's but for near ties. The operators are then tested under
torch.compile, in CUDA graphs, and with input that is not contiguous.

Prints a line per shape; the exit status is 1 on any fault. --small stops after the small shapes; --sanitize runs those
again under compute-sanitizer, with a separate allocation for every tensor. Most of the time is spent on compiling some
400 variants. Each shape runs in its own process, --jobs of them at a time, so a kernel that crashes stops no other shape.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import lowrank as lowranks
from paredown.kernels import ops, paths
from paredown.kernels import sparse24 as sparse24s
from paredown.kernels.dispatch import Choice, arch_of

TILES = [(16, 64), (32, 512), (33, 100), (5, 300), (1, 4), (256, 1024)]
MODELS = {
    "Llama-3-8B": [(6144, 4096), (1024, 4096), (4096, 4096), (28672, 4096), (14336, 4096), (4096, 14336)],
    "Qwen3-4B": [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
}
TOKENS = (1, 2, 7, 8, 16, 33, 64, 65, 300)
# largest relative error of a result that is rounded once (by at most 2^-8 and 2^-11), and how much larger it may be if an
# intermediate result was rounded as well
ONCE = {torch.bfloat16: 4.1e-3, torch.float16: 5.2e-4}
CHAIN = 2.5
# (columns, out) of a block of the sweep, and the pattern n:m; None: a mask given beforehand
SWEEPS = (((128, 4096), None), ((128, 4096), (2, 4)), ((128, 1000), (4, 8)), ((36, 33), (1, 4)), ((17, 5), None))
SWEPT = 1e-5  # largest relative error of a sweep in float32
NEAR_TIES = 1e-3  # largest share of the mask that may differ from the loop's: one near tie alters the rest of a row


@dataclass(frozen=True)
class Subject:
    """One way to multiply. `run(x, bias, y)` returns the product; a kernel writes it to y, other ways ignore y."""

    name: str
    dense: Tensor  # (out, in), float64
    run: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    tolerance: float = 1.0  # allowed relative error, in units of ONCE
    most_tokens: int = 1 << 20


def subjects(out: int, inner: int, dtype: torch.dtype, device: torch.device) -> Iterator[Subject]:
    """Every kernel and path with a random weight of this shape. Some of its values are -0.0."""
    from paredown.kernels import bitmap_expand, lowrank_chain, sparse24_cusparselt, sparse24_expand, sparse24_mma

    weight = (torch.randn(out, inner, device=device) / inner**0.5).to(dtype)
    weight[torch.rand_like(weight) < 0.02] = -0.0
    keep = torch.rand(out, inner // 4, 4, device=device).argsort(-1).argsort(-1).lt(2).reshape(out, inner)
    values, indices = sparse24s.pack24(weight, keep)
    dense = (weight * keep).double()
    rank = max(1, min(out, inner) // 5)
    even = rank + rank % 2 if rank < min(out, inner) else rank - rank % 2
    left, right = (
        (torch.randn(out, even, device=device) / even**0.5).to(dtype),
        weight[:1].new_empty(even, inner).normal_(),
    )
    right /= inner**0.5
    product = left.double() @ right.double()

    def ranked(kernel: Callable[..., object]) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        def run(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
            kernel(x, values, indices, bias, y, (left, lowrank_chain.partial_sums(x, right)))
            return y

        return run

    def into_y(kernel: Callable[..., object], *tensors: Tensor) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        def run(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
            kernel(x, *tensors, bias, y)
            return y

        return run

    def path(op: str, name: str, *tensors: Tensor) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
        choice = Choice(op, out, inner, 1, name)
        return lambda x, bias, y: paths.PATHS[op](choice, x, tensors, bias, y)

    yield Subject("sparse24 as the table says", dense, lambda x, bias, y: ops.sparse24_matmul(x, values, indices, bias))
    if arch_of(device) >= 80:
        yield Subject("sparse24 mma.sp", dense, into_y(sparse24_mma.matmul, values, indices), most_tokens=128)
        if even:
            # as the operator runs it: other registers than `mma.sp` needs are found, and the portable kernel takes over
            choice = Choice("sparse24", out, inner, 1, "mma")

            def checked(x: Tensor, values: Tensor, indices: Tensor, *rest: Any) -> Tensor:
                bias, y, lowrank = rest
                return paths.sparse24(choice, x, (values, indices), bias, y, lowrank)

            yield Subject("sparse24 + low rank mma.sp", dense + product, ranked(checked), CHAIN, 128)
    yield Subject("sparse24 expand", dense, into_y(sparse24_expand.matmul, values, indices))
    if even:
        yield Subject("sparse24 + low rank expand", dense + product, ranked(sparse24_expand.matmul), CHAIN)
    yield Subject("sparse24 dense", dense, path("sparse24", "dense", values, indices))
    if sparse24_cusparselt.is_available(values):
        yield Subject("sparse24 cuSPARSELt", dense, path("sparse24", "cusparselt", values, indices))

    mask = torch.rand_like(weight, dtype=torch.float32) < 0.4
    packed, bitmap = bitmaps.pack_bitmap(weight, mask)
    starts = bitmaps.row_starts(bitmap)
    masked = (weight * mask).double()
    yield Subject("bitmap", masked, into_y(bitmap_expand.matmul, packed, bitmap, starts))
    yield Subject("bitmap dense", masked, path("bitmap", "dense", packed, bitmap, starts))

    if even:

        def factors(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
            lowrank_chain.lowrank_matmul(x, left, right, bias, y, [even], [out])
            return y

        yield Subject("low rank", product, factors, CHAIN)
        yield Subject(
            "low rank as the table says", product, lambda x, bias, y: ops.lowrank_matmul(x, left, right, bias), CHAIN
        )
    if even and out > even:
        coefficients = (torch.randn(out - even, even, device=device) / even**0.5).to(dtype)
        order = torch.randperm(out, device=device).int()

        def pifa(x: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
            lowrank_chain.pifa_matmul(x, right, coefficients, order, bias, y, [even], [out])
            return y

        rows = torch.cat((right.double(), coefficients.double() @ right.double()))[order.long()]
        yield Subject("pifa", rows, pifa, CHAIN)
    if even:
        link = (torch.randn(even, even, device=device) / even**0.5).to(dtype)
        chained = left.double() @ link.double() @ right.double()
        yield Subject("cur", chained, into_y(lowrank_chain.cur_matmul, left, link, right), 2 * CHAIN)


@torch.no_grad()
def check_shape(
    out: int, inner: int, dtype: torch.dtype, device: torch.device, tokens: Sequence[int] = TOKENS
) -> list[str]:
    """The faults of all subjects of a shape, in words."""
    torch.manual_seed(0)
    return [fault for s in subjects(out, inner, dtype, device) for fault in check_subject(s, dtype, tokens)]


@torch.no_grad()
def check_subject(subject: Subject, dtype: torch.dtype, tokens: Sequence[int] = TOKENS) -> list[str]:
    """The faults of one subject at these numbers of tokens, in words. Odd numbers are tested with a bias."""
    (out, inner), device = subject.dense.shape, subject.dense.device
    faults = []
    for count in (n for n in tokens if n <= subject.most_tokens):
        x = torch.randn(count, inner, device=device, dtype=dtype)
        bias = torch.randn(out, device=device, dtype=dtype) if count % 2 else None
        try:
            fault = _fault(subject, x, bias, ONCE[dtype] * subject.tolerance)
        except Exception as error:  # a kernel that does not compile must not hide the results of the others
            fault = _describe(error)
        if fault:
            faults.append(f"{subject.name}, {count} tokens: {fault}")
    return faults


def check_shapes(
    shapes: Sequence[tuple[int, int]], device: torch.device, jobs: int, dtypes: Iterable[torch.dtype] = tuple(ONCE),
    check: Callable[[int, int, torch.dtype, torch.device], list[str]] = check_shape,
) -> Iterator[list[str]]:  # fmt: skip
    """The faults of each shape in each dtype: all dtypes of the first shape, then those of the next.

    With 1 job `check` runs in this process, otherwise in a new process for each case, `jobs` of them at a time. An exception
    in such a process, or its crash, becomes a fault of its case.
    """
    cases = [(*shape, dtype, device) for shape in shapes for dtype in dtypes]
    if jobs == 1:
        yield from (check(*case) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in [pool.submit(check, *case) for case in cases]:
            try:
                yield future.result()
            except Exception as error:  # out of memory, or a GPU that allows one process only: --jobs 1 helps
                yield [_describe(error)]


def _fault(subject: Subject, x: Tensor, bias: Tensor | None, limit: float) -> str | None:
    exact = x.double() @ subject.dense.T + (0 if bias is None else bias.double())
    first, second = (
        subject.run(x, bias, torch.full((len(x), len(subject.dense)), torch.nan, device=x.device, dtype=x.dtype))
        for _ in range(2)
    )
    if not torch.isfinite(first).all():
        return f"{int((~torch.isfinite(first)).sum())} outputs are not finite"
    error = float((first.double() - exact).norm() / exact.norm().clamp_min(1e-30))
    if error > limit:
        return f"relative error {error:.2e}, more than {limit:.2e}"
    return None if torch.equal(first, second) else "a second launch gives other bits"


@torch.no_grad()
def check_sweeps(
    device: torch.device, cases: Sequence[tuple[tuple[int, int], tuple[int, int] | None]] = SWEEPS
) -> list[str]:
    """The faults of SparseGPT's sweep over a block of columns, in words."""
    faults = []
    for shape, pattern in cases:
        try:
            fault = _sweep_fault(shape, pattern, device)
        except Exception as error:  # as in check_subject
            fault = _describe(error)
        if fault:
            of = "a fixed mask" if pattern is None else f"{pattern[0]}:{pattern[1]}"
            faults.append(f"{shape[0]} columns of {shape[1]} rows, {of}: {fault}")
    return faults


def _sweep_fault(shape: tuple[int, int], pattern: tuple[int, int] | None, device: torch.device) -> str | None:
    from paredown.kernels import obs_sweep

    columns = shape[0]
    torch.manual_seed(0)
    inputs = torch.randn(4 * columns, columns, dtype=torch.float64) @ torch.randn(columns, columns, dtype=torch.float64)
    inverse = torch.linalg.inv(inputs.T @ inputs / len(inputs) + columns / 100 * torch.eye(columns))
    factor = torch.linalg.cholesky(inverse, upper=True).float().to(device)  # (columns, columns)
    block = torch.randn(shape, device=device)  # (columns, out)
    block[columns // 3] = 0.0  # as a dead column
    keep = torch.rand(shape, device=device) < 0.5 if pattern is None else None
    with poisoned():
        first, second = (obs_sweep.sweep(block, factor, keep, pattern) for _ in range(2))
    exact = obs_sweep.naive(block.double(), factor.double(), first[2])
    for name, found, wanted in zip(("updated block", "errors"), first, exact, strict=False):
        error = float((found.double() - wanted).norm() / wanted.norm())
        if not error <= SWEPT:  # NaN is a fault
            return f"relative error of the {name} {error:.2e}, more than {SWEPT:.2e}"
    differ = float((first[2] != obs_sweep.naive(block, factor, keep, pattern)[2]).float().mean())
    if differ > NEAR_TIES:
        return f"{differ:.1%} of the mask differ from the loop's"
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return None if same else "a second launch gives other bits"


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN, or with True, until something is written to them."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@torch.no_grad()
def check_operators(device: torch.device) -> list[str]:
    """The faults of the operators under torch.compile, in CUDA graphs, and with input that is not contiguous."""
    faults = []
    weight = torch.randn(512, 1024, device=device).bfloat16()
    keep = torch.rand(512, 256, 4, device=device).argsort(-1).argsort(-1).lt(2).reshape(512, 1024)
    values, indices = sparse24s.pack24(weight, keep)
    left, right = torch.randn(512, 64, device=device).bfloat16(), torch.randn(64, 1024, device=device).bfloat16()
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse24": lambda x: ops.sparse24_matmul(x, values, indices),
        "lowrank": lambda x: ops.lowrank_matmul(x, left, right),
    }
    dense = {"sparse24": weight * keep, "lowrank": lowranks.lowrank_dense(left, right)}
    for name, call in calls.items():
        try:
            faults += [f"{name}: {fault}" for fault in _operator_faults(call, dense[name])]
        except Exception as error:  # for example, torch.compile on a machine without a C compiler
            faults.append(f"{name}: {_describe(error)}")
    return faults


def _operator_faults(call: Callable[[Tensor], Tensor], dense: Tensor) -> Iterator[str]:
    x = torch.randn(dense.shape[1], 5, device=dense.device).bfloat16().t()  # not contiguous
    eager, exact = call(x), x.double() @ dense.double().T
    if float((eager.double() - exact).norm() / exact.norm()) > 2e-2:
        yield "wrong for an input that is not contiguous"
    static = x.contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(static)
    static.copy_(torch.randn_like(static))
    graph.replay()
    if not torch.equal(out, call(static)):
        yield "a CUDA graph gives other bits"
    if not torch.equal(torch.compile(lambda x: call(x) + 0, fullgraph=True)(x), eager):
        yield "torch.compile gives other bits"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: the kernels' mathematics is tested on a CPU by tests/kernels, this tests a device")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    shapes = [("tile", shape) for shape in TILES]
    if not options.small:
        shapes += [(name, shape) for name, group in MODELS.items() for shape in group]
    count = 0
    rows = [(name, *shape, dtype) for name, shape in shapes for dtype in ONCE]
    results = check_shapes([shape for _, shape in shapes], device, options.jobs)
    for (name, out, inner, dtype), faults in zip(rows, results, strict=True):
        verdict = "ok" if not faults else f"{len(faults)} FAULTS"
        print(f"{name:<14} {out:>6} x {inner:<6} {str(dtype)[6:]:<10} {verdict}", flush=True)
        for fault in faults[:10]:
            print("   ", fault)
        count += len(faults)
    faults = check_sweeps(device)
    print("SparseGPT sweep:", "ok" if not faults else "; ".join(faults), flush=True)
    count += len(faults)
    if not options.small:
        faults = check_operators(device)
        print("operators:", "ok" if not faults else "; ".join(faults), flush=True)
        count += len(faults)
    if options.sanitize:
        count += _sanitized()
    return min(count, 1)


def _sanitized() -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer: not found on PATH (it comes with the CUDA toolkit), skipped")
        return 0
    small = ["-m", "paredown.kernels.selftest", "--small", "--jobs", "1"]
    command = [tool, "--error-exitcode", "9", sys.executable, *small]
    # torch places many tensors in one large allocation, where the tool does not see reads beyond the end of a tensor
    status = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode
    print("compute-sanitizer:", "clean" if status == 0 else f"exit status {status}")
    return status != 0


if __name__ == "__main__":
    sys.exit(main())
