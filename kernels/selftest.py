"""Are the kernels right on this GPU? One command, nothing to prepare.

    python -m paredown.kernels.selftest [--small] [--sanitize] [--jobs 8]

Random tiles first, then the shapes of Llama-3-8B, Qwen3-4B and Llama-3.2-1B: every kernel and path, and the operators
with the tiles that this device's table gives them, bfloat16 and float16, with and without bias, 1 to 300 tokens, against
the float64 product of the unpacked weight, by relative Frobenius error; outputs are filled with NaN before each launch,
and every launch must repeat bit for bit. Then the operators under torch.compile and in CUDA graphs, and with input that
is not contiguous. Prints a line per shape; the exit status is 1 on any fault. --small stops after the tiles; --sanitize
runs those once more under compute-sanitizer, every tensor in an allocation of its own. Most of the time goes into
compiling some 400 variants: every shape has a process of its own, --jobs of them at a time, and one that a kernel
crashes takes no other with it.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from paredown.kernels import bitmap as bitmaps
from paredown.kernels import lowrank as lowranks
from paredown.kernels import ops, paths
from paredown.kernels import sparse24 as sparse24s
from paredown.kernels.dispatch import Choice

TILES = [(16, 64), (32, 512), (33, 100), (5, 300), (1, 4), (256, 1024)]
MODELS = {
    "Llama-3-8B": [(6144, 4096), (1024, 4096), (4096, 4096), (28672, 4096), (14336, 4096), (4096, 14336)],
    "Qwen3-4B": [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
}
TOKENS = (1, 2, 7, 8, 16, 33, 64, 65, 300)
# a result rounded once (at most by 2^-8 and 2^-11), and one whose intermediate was rounded as well
ONCE = {torch.bfloat16: 4.1e-3, torch.float16: 5.2e-4}
CHAIN = 2.5


@dataclass(frozen=True)
class Subject:
    """A way to multiply: `run(x, bias, y)` returns the product, in y where it takes one."""

    name: str
    dense: Tensor  # (out, in), float64
    run: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    tolerance: float = 1.0  # times ONCE
    most_tokens: int = 1 << 20


def subjects(out: int, inner: int, dtype: torch.dtype, device: torch.device) -> Iterator[Subject]:
    """Every kernel and path on a random weight of this shape. Some kept values are -0.0."""
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
    if _has_mma(device):
        yield Subject("sparse24 mma.sp", dense, into_y(sparse24_mma.matmul, values, indices), most_tokens=128)
        if even:
            yield Subject("sparse24 + low rank mma.sp", dense + product, ranked(sparse24_mma.matmul), CHAIN, 128)
    yield Subject("sparse24 expand", dense, into_y(sparse24_expand.matmul, values, indices))
    if even:
        yield Subject("sparse24 + low rank expand", dense + product, ranked(sparse24_expand.matmul), CHAIN)
    yield Subject("sparse24 dense", dense, path("sparse24", "dense", values, indices))
    if sparse24_cusparselt.is_available(values):
        yield Subject("sparse24 cuSPARSELt", dense, path("sparse24", "cusparselt", values, indices))

    some = torch.rand_like(weight, dtype=torch.float32) < 0.4
    kept, bitmap = bitmaps.pack_bitmap(weight, some)
    starts = bitmaps.row_starts(bitmap)
    loose = (weight * some).double()
    yield Subject("bitmap", loose, into_y(bitmap_expand.matmul, kept, bitmap, starts))
    yield Subject("bitmap dense", loose, path("bitmap", "dense", kept, bitmap, starts))

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
def check_shape(out: int, inner: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Faults of all subjects of a shape, in words."""
    torch.manual_seed(0)
    faults = []
    for subject in subjects(out, inner, dtype, device):
        for tokens in (n for n in TOKENS if n <= subject.most_tokens):
            x = torch.randn(tokens, inner, device=device, dtype=dtype)
            bias = torch.randn(out, device=device, dtype=dtype) if tokens % 2 else None
            try:
                fault = _fault(subject, x, bias, ONCE[dtype] * subject.tolerance)
            except Exception as raised:  # one kernel that does not compile must not hide what the others do
                fault = _told(raised)
            if fault:
                faults.append(f"{subject.name}, {tokens} tokens: {fault}")
    return faults


def check_shapes(shapes: list[tuple[int, int]], device: torch.device, jobs: int) -> Iterator[list[str]]:
    """Of each shape and each dtype in turn; `jobs` of them at a time, in processes of their own, or 1 in this one."""
    cases = [(*shape, dtype, device) for shape in shapes for dtype in ONCE]
    if jobs == 1:
        yield from (check_shape(*case) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for waiting in [pool.submit(check_shape, *case) for case in cases]:
            try:
                yield waiting.result()
            except Exception as raised:  # out of memory, a GPU that takes one process: --jobs 1
                yield [_told(raised)]


def _fault(subject: Subject, x: Tensor, bias: Tensor | None, limit: float) -> str | None:
    wanted = x.double() @ subject.dense.T + (0 if bias is None else bias.double())
    first, second = (
        subject.run(x, bias, torch.full((len(x), len(subject.dense)), torch.nan, device=x.device, dtype=x.dtype))
        for _ in range(2)
    )
    if not torch.isfinite(first).all():
        return f"{int((~torch.isfinite(first)).sum())} outputs are not finite"
    error = float((first.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if error > limit:
        return f"relative error {error:.2e}, more than {limit:.2e}"
    return None if torch.equal(first, second) else "a second launch gives other bits"


@torch.no_grad()
def check_operators(device: torch.device) -> list[str]:
    """The operators under torch.compile and in CUDA graphs, and with input that is not contiguous."""
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
        except Exception as raised:  # a machine without a C compiler, say
            faults.append(f"{name}: {_told(raised)}")
    return faults


def _operator_faults(call: Callable[[Tensor], Tensor], dense: Tensor) -> Iterator[str]:
    x = torch.randn(dense.shape[1], 5, device=dense.device).bfloat16().t()  # not contiguous
    eager, wanted = call(x), x.double() @ dense.double().T
    if float((eager.double() - wanted).norm() / wanted.norm()) > 2e-2:
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


def _told(raised: Exception) -> str:
    return f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"


def _has_mma(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--sanitize", action="store_true")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: the kernels' mathematics is tested on a CPU by tests/kernels, this tests a device")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
    shapes = [("tile", shape) for shape in TILES]
    if not chosen.small:
        shapes += [(name, shape) for name, group in MODELS.items() for shape in group]
    count = 0
    rows = [(name, *shape, dtype) for name, shape in shapes for dtype in ONCE]
    found = check_shapes([shape for _, shape in shapes], device, chosen.jobs)
    for (name, out, inner, dtype), faults in zip(rows, found, strict=True):
        verdict = "ok" if not faults else f"{len(faults)} FAULTS"
        print(f"{name:<14} {out:>6} x {inner:<6} {str(dtype)[6:]:<10} {verdict}", flush=True)
        for fault in faults[:10]:
            print("   ", fault)
        count += len(faults)
    if not chosen.small:
        faults = check_operators(device)
        print("operators:", "ok" if not faults else "; ".join(faults), flush=True)
        count += len(faults)
    if chosen.sanitize:
        count += _sanitized()
    return min(count, 1)


def _sanitized() -> int:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("compute-sanitizer: not found on PATH (it comes with the CUDA toolkit), skipped")
        return 0
    small = ["-m", "paredown.kernels.selftest", "--small", "--jobs", "1"]
    command = [tool, "--error-exitcode", "9", sys.executable, *small]
    # torch hands out pieces of large allocations, and what is read past the end of a piece is not seen
    status = subprocess.run(command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode
    print("compute-sanitizer:", "clean" if status == 0 else f"exit status {status}")
    return status != 0


if __name__ == "__main__":
    sys.exit(main())
