"""What the kernels compile to, on any machine: no GPU is needed, only the compiler and disassembler inside Triton.

    python -m paredown.kernels.aot [--arch 80 90] [--kernel NAME]

Prints a row per kernel and architecture: registers, spills, shared memory, tensor core instructions (HMMA.SP: sparse
ones), and instructions of the main loop per weight and thread. Faults are: spills; more instructions than the budget; and,
in a kernel with `mma.sp`, no HMMA.SP or a wrong register layout, which Triton does not guarantee. Any fault makes the exit
status 1. At full bandwidth an H100 has time for 9.9 instructions per weight and thread for 2:4 weights of 9 bits, an H200
for 6.9. If Triton or one of its tools is missing, the command says so and exits with status 0.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

SHAPE = (4096, 4096)
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel to compile. `launch()` calls the kernels of a product with tensors on `meta`; `which` of them is meant."""

    name: str
    launch: Callable[[], object]
    weights: Callable[[dict[str, Any]], float] = lambda options: 0.0  # weights per iteration of the main loop
    budget: float = 0.0  # most instructions per weight and thread; 0: not counted
    which: int = 0
    mma_sp: bool = False


@dataclass(frozen=True)
class Row:
    """What a case compiled to. spills: instructions and bytes of local memory; shared: bytes; fault: what is wrong."""

    name: str
    arch: int
    registers: int
    spills: int
    shared: int
    sparse_mma: int
    mma: int
    per_weight: float
    fault: str | None


def cases() -> list[Case]:
    """The kernels for few tokens with the tiles of the shipped tables, and the kernels that write dense weights."""
    from paredown.kernels import bitmap_expand, lowrank_chain, obs_sweep, sparse24_expand, sparse24_mma
    from paredown.kernels.sparse24 import index_bytes

    out, inner = SHAPE

    def half(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    def of(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, y, values, dense = half(1, inner), half(1, out), half(out, inner // 2), half(out, inner)
    x64, y64, bias = half(64, inner), half(64, out), half(out)
    indices = of(torch.uint8, out, index_bytes(inner))
    kept, bitmap, starts = half(out * inner // 2), of(torch.uint8, out, inner // 8), of(torch.int32, out + 1)
    left, right = half(out, 1024), half(1024, inner)
    pivots, coefficients, order = half(1024, inner), half(out - 1024, 1024), of(torch.int32, out)
    summed = (half(out, 64), of(torch.float32, 4, 1, 64))
    block, factor, keep = of(torch.float32, 128, out), of(torch.float32, 128, 128), of(torch.bool, 128, out)

    def mma_weights(o: dict[str, Any]) -> float:
        return float(16 * o["ROW_TILES"] * 256 * o["WARPS"] * o["UNROLL"])

    def expand_weights(o: dict[str, Any]) -> float:
        return float(o["ROWS"] * 64 * o["BLOCKS"])

    def mma(tokens: torch.Tensor, result: torch.Tensor, lowrank: Any = None, **tile: int) -> Callable[[], object]:
        return lambda: sparse24_mma.matmul(tokens, values, indices, bias, result, lowrank, **tile)

    return [
        Case("tokens in the order of fragments", mma(x64, y64)),
        Case("sparse24 mma.sp, 1 token", mma(x, y), mma_weights, 1.25, 1, mma_sp=True),
        Case("sparse24 mma.sp, 1 token, 2 row tiles", mma(x, y, row_tiles=2), mma_weights, 1.25, 1, mma_sp=True),
        Case("sparse24 mma.sp, 64 tokens", mma(x64, y64, row_tiles=2), mma_weights, 3.25, 1, mma_sp=True),
        Case("sparse24 + low rank mma.sp", mma(x, y, summed), which=1, mma_sp=True),
        Case("sparse24 expand", lambda: sparse24_expand.matmul(x, values, indices, bias, y), expand_weights, 6.0),
        Case("sparse24 decompress", lambda: sparse24_expand.decompress(values, indices, dense)),
        Case(
            "bitmap expand", lambda: bitmap_expand.matmul(x, kept, bitmap, starts, bias, y),
            lambda o: 8 * o["OCTETS"] * 128 * o["WARPS"], 13.0,
        ),
        Case("bitmap decompress", lambda: bitmap_expand.decompress(kept, bitmap, starts, dense)),
        Case("low rank down", lambda: lowrank_chain.lowrank_matmul(x, left, right, bias, y, [1024], [out])),
        Case("low rank up", lambda: lowrank_chain.lowrank_matmul(x, left, right, bias, y, [1024], [out]), which=1),
        Case(
            "pifa up", which=1,
            launch=lambda: lowrank_chain.pifa_matmul(x, pivots, coefficients, order, bias, y, [1024], [out]),
        ),
        Case("SparseGPT sweep, fixed mask", lambda: obs_sweep.sweep(block, factor, keep)),
        Case("SparseGPT sweep, 4:8", lambda: obs_sweep.sweep(block, factor, pattern=(4, 8))),
    ]  # fmt: skip


def compile_case(case: Case, arch: int) -> Row:
    """Compile a case for an architecture (90 for compute capability 9.0). Triton's own error if that fails."""
    import triton
    from triton.backends.compiler import GPUTarget

    kernel, arguments, options = _launches(case.launch, arch)[case.which]
    source = _source(kernel, arguments)
    settings = {key: value for key, value in options.items() if key in ("num_warps", "num_stages")}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=settings)
    lines, resources = _disassembled(compiled.asm["cubin"])
    bodies = loops(lines)
    if case.mma_sp:  # the loop over weights is the one with sparse products; another one adds partial sums
        bodies = [body for body in bodies if any("HMMA.SP" in line for line in body)]
    loop = max(bodies, key=len, default=[])
    weights = case.weights(arguments)
    row = Row(
        case.name, arch, resources["REG"], _count(lines, r"\b(STL|LDL)\b") + resources["LOCAL"], compiled.metadata.shared,
        _count(lines, r"\bHMMA\.SP"), _count(lines, r"(?<!\.)\bH?G?MMA(?!\.SP)"),
        len(loop) * 32 * settings["num_warps"] / weights if weights else 0.0, None,
    )  # fmt: skip
    return Row(**{**row.__dict__, "fault": fault_of(case, row, compiled.asm["ttgir"])})


def fault_of(case: Case, row: Row, ttgir: str) -> str | None:
    """What is wrong with a row, or None. ttgir: Triton's GPU code of the kernel, which shows the register layouts."""
    from paredown.kernels.sparse24_mma import layout_fault

    if row.spills:
        return f"{row.spills} spills"
    if case.mma_sp and not row.sparse_mma:
        return "no HMMA.SP"
    if case.mma_sp and (fault := layout_fault(ttgir)):
        return fault
    if case.budget and row.per_weight > case.budget:
        return f"{row.per_weight:.2f} instructions per weight, more than {case.budget}"
    return None


@contextmanager
def _recording() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches are recorded as (kernel, arguments, options) instead of run."""
    from triton.runtime.jit import JITFunction

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append((self, args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def _launches(launch: Callable[[], object], arch: int) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """(kernel, its arguments by name, launch options) of every launch."""
    from paredown.kernels import lowrank_chain, sparse24_mma

    with _recording() as recorded, ExitStack() as patches:
        for module in (lowrank_chain, sparse24_mma):  # a real launch asks its device
            patches.enter_context(mock.patch.object(module, "dependent_launch", lambda device: arch >= 90))
        launch()
    launches = []
    for kernel, args, options in recorded:
        names = [parameter.name for parameter in kernel.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in options.items() if k in names}
        launches.append((kernel, arguments | ({"INTERP": False} if "INTERP" in names else {}), options))
    return launches


def _source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """The kernel, specialised as a launch would: for aligned pointers and numbers that are divisible by 16."""
    from triton.compiler import ASTSource

    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        if fixed:
            signature[parameter.name], constants[(place,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple("i32" for _ in value)
            attributes |= {(place, i): [["tt.divisibility", 16]] for i, number in enumerate(value) if number % 16 == 0}
        else:
            signature[parameter.name] = "*" + TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _disassembled(cubin: bytes) -> tuple[list[str], dict[str, int]]:
    """The labels and instructions of a cubin, and the registers (REG) and local memory (LOCAL) that it uses."""
    tools = _tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tools["nvdisasm"], "-c", file.name], check=True, capture_output=True, text=True).stdout
        used = subprocess.run([tools["cuobjdump"], "-res-usage", file.name], check=True, capture_output=True, text=True)
    resources = re.findall(r"\b(REG|LOCAL):(\d+)", used.stdout + used.stderr)
    lines = [m[1] or m[2] for m in re.finditer(r"^\s*(?:(\.L_x_\d+):|/\*[0-9a-f]{4,}\*/\s+(.*?);)", text, re.MULTILINE)]
    return lines, {name: int(number) for name, number in resources}


def loops(lines: list[str]) -> list[list[str]]:
    """The instructions of each loop: those between a label and a jump back to it. lines: labels and instructions."""
    places = {line: place for place, line in enumerate(lines) if line.startswith(".L_x_")}
    bodies = []
    for place, line in enumerate(lines):
        target = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if target and places.get(target[1], place) < place:
            bodies.append([text for text in lines[places[target[1]] : place + 1] if not text.startswith(".L_x_")])
    return bodies


def _count(lines: list[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, line)) for line in lines)


def _tools() -> dict[str, Path]:
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    return {name: folder / name for name in ("ptxas", "nvdisasm", "cuobjdump")}


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    from paredown.kernels.primitives import INTERPRETED

    if INTERPRETED:
        return "TRITON_INTERPRET is set: kernels are interpreted and not compiled"
    absent = [name for name, path in _tools().items() if not path.exists()]
    return f"this Triton comes without {', '.join(absent)}" if absent else None


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; `arguments` replaces those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    options = parser.parse_args(arguments)
    # Triton 3.9 warns that this default will change; setting it makes all versions compile alike
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if reason := missing():
        print(f"skipped: {reason}")
        return 0
    print(f"{'kernel':<40} arch  registers  spills  shared  HMMA.SP  other MMA  per weight")
    faults = 0
    for case in (case for case in cases() if options.kernel in case.name):
        for arch in options.arch:
            row = compile_case(case, arch)
            per_weight = f"{row.per_weight:.2f}" if row.per_weight else ""
            print(
                f"{row.name:<40} {arch:>4}  {row.registers:>9}  {row.spills:>6}  {row.shared:>6}  {row.sparse_mma:>7}  "
                f"{row.mma:>9}  {per_weight:>10}{'  FAULT: ' + row.fault if row.fault else ''}",
                flush=True,
            )
            faults += row.fault is not None
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
