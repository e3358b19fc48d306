"""How fast the kernels are on this GPU compared with dense products, and whether they reach their bars. One command.

    python -m paredown.kernels.benchmark [--quick] [--only sparse24 model] [--write TABLE.json] [--dtype bfloat16]

A bar is the smallest ratio dense time / our time that is accepted. Each row shows the fastest path and tile (tuning.py
says how they are timed), the median and range in microseconds, bytes of the packed weight per second, and the ratio with
its bar. The last row multiplies with all linears of a model of Llama-3-8B's shape in one CUDA graph, with a dense lm_head
and without attention and norms (`paredown bench` times whole models).

Prints Markdown for BENCHMARKS.md. --write saves the measurements as a dispatch table; a table of this GPU that is already
there keeps its other choices. So a benchmark can be split into parts when time is short (--only sparse24 model, then
--only lowrank pifa sparse24_lowrank bitmap). The exit status is 1 if a bar is missed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from paredown.kernels import paths
from paredown.kernels.dispatch import Choice, DispatchTable, arch_of
from paredown.kernels.timing import Timing, interleaved
from paredown.kernels.tuning import Measurement, Product, best, compile_ahead, random_product

MLP = [(14336, 4096), (4096, 14336)]
QKV = (6144, 4096)
HALF_RANK = 1584  # half of the parameters of a 4096 x 14336 weight; a multiple of 16
LAYERS, LM_HEAD = 32, (128256, 4096)
BLOCK = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]  # grouped q/k/v, o, grouped gate/up, down


@dataclass(frozen=True)
class Line:
    """A product, the numbers of tokens to time it with, and its bar (None: it is only reported)."""

    product: Product
    tokens: Sequence[int]
    bar: float | None


LINES = [
    *(Line(Product("sparse24", *shape), (1, 8, 16), 1.5) for shape in MLP),
    Line(Product("sparse24", *QKV), (1, 8, 16), 1.4),
    *(Line(Product("sparse24", *shape), (64,), 1.3) for shape in (*MLP, QKV)),
    *(Line(Product("sparse24", *shape), (256, 1024, 4096, 16384), 1.2) for shape in (*MLP, QKV)),
    *(Line(Product("sparse24", *shape), (32,), None) for shape in (*MLP, QKV)),
    Line(Product("lowrank", 4096, 14336, HALF_RANK), (1, 8, 16), 1.7),
    Line(Product("pifa", 4096, 14336, 1792), (1, 16), None),
    Line(Product("sparse24_lowrank", 4096, 14336, 128), (1, 16), None),
    Line(Product("bitmap", 4096, 14336, density=0.5), (1, 16), None),
    Line(Product("bitmap", 4096, 14336, density=0.3), (1, 16), None),
]
MODEL_BAR = 1.45


def packed_bytes(product: Product, dtype: torch.dtype) -> float:
    """Bytes of the packed weight that a product reads, without activations."""
    rows, columns, rank, size = product.rows, product.columns, product.rank, dtype.itemsize
    factors = rank * (rows + columns) * size
    return {
        "sparse24": rows * columns * (size / 2 + 1 / 8), "sparse24_lowrank": rows * columns * (size / 2 + 1 / 8) + factors,
        "bitmap": rows * columns * (size * product.density + 1 / 8), "lowrank": factors,
        "pifa": rank * (rows + columns - rank) * size, "cur": factors + rank * rank * size,
    }[product.op]  # fmt: skip


@torch.no_grad()
def model_times(
    device: torch.device, dtype: torch.dtype, tokens: int, choices: dict[tuple[int, int], Choice]
) -> dict[str, Timing]:
    """The time of all linears of the model, each run once: "ours" (packed) and "dense". No two layers share weights."""
    block = {shape: random_product(Product("sparse24", *shape), device, dtype) for shape in BLOCK}
    layers = [
        {shape: (tuple(t.clone() for t in tensors), dense.clone()) for shape, (tensors, dense) in block.items()}
        for _ in range(LAYERS)
    ]
    head = torch.randn(LM_HEAD, device=device, dtype=dtype)
    inputs = {columns: torch.randn(tokens, columns, device=device, dtype=dtype) for columns in (4096, 14336)}
    outputs = {rows: inputs[4096].new_empty(tokens, rows) for rows, _ in BLOCK}

    def run(
        multiply: Callable[[Tensor, tuple[int, int], tuple[tuple[Tensor, ...], Tensor]], object],
    ) -> Callable[[], None]:
        def call() -> None:
            for layer in layers:
                for shape, weight in layer.items():
                    multiply(inputs[shape[1]], shape, weight)
            F.linear(inputs[4096], head)

        return call

    ours = run(lambda x, shape, weight: paths.sparse24(choices[shape], x, weight[0], None, outputs[shape[0]]))
    return interleaved({"ours": ours, "dense": run(lambda x, shape, weight: F.linear(x, weight[1]))}, device, 20)


def line_of(product: Product, tokens: int, bar: float | None, result: Measurement, dtype: torch.dtype) -> str:
    """One row of the Markdown table."""
    what = (
        product.op
        + (f" rank {product.rank}" if product.rank else "")
        + (f" {product.density:.0%}" if product.op == "bitmap" else "")
    )
    tile = " ".join(f"{key}={value}" for key, value in result.choice.tile.items())
    rate = packed_bytes(product, dtype) / result.time.median / 1e9
    return (
        f"| {what} | {product.rows}x{product.columns} | {tokens} | {result.choice.path} {tile} | {_us(result.time)} | "
        f"{_us(result.dense)} | {rate:.0f} | {_verdict(result.dense.median / result.time.median, bar)} |"
    )


def _us(time: Timing) -> str:
    return f"{time.median * 1e6:.1f} ({time.low * 1e6:.1f} to {time.high * 1e6:.1f})"


def _verdict(ratio: float, bar: float | None) -> str:
    return f"{ratio:.2f}x" if bar is None else f"{ratio:.2f}x, bar {bar:.2f}x {'met' if ratio >= bar else 'MISSED'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one number of tokens per line, and no model")
    parser.add_argument("--only", nargs="+", choices=[*paths.PATHS, "model"], default=[*paths.PATHS, "model"])
    parser.add_argument("--write", type=Path, default=None)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU here: there is nothing to time. What the kernels compile to: python -m paredown.kernels.aot")
        return 1
    import triton

    device, dtype = torch.device("cuda", torch.cuda.current_device()), getattr(torch, options.dtype)
    torch.manual_seed(0)
    name, versions = torch.cuda.get_device_name(device), {"torch": torch.__version__, "triton": triton.__version__}
    print(
        f"{name}, torch {versions['torch']}, triton {versions['triton']}, {date.today().isoformat()}, {options.dtype}\n"
    )
    print("| what | weight | tokens | path | us, median (range) | dense us | GB/s | dense / ours |\n|" + " --- |" * 8)
    lines = [line for line in LINES if line.product.op in options.only]
    work = [(line.product, t, line.bar) for line in lines for t in (line.tokens[:1] if options.quick else line.tokens)]
    compile_ahead([(product, tokens) for product, tokens, _ in work], device, dtype)
    choices, missed = [], 0
    for product, tokens, bar in work:
        result = best(product, tokens, device, dtype)
        print(line_of(product, tokens, bar, result, dtype), flush=True)
        choices.append(result.choice)
        if options.write:  # after each, because the time may be over
            write_table(options.write, device, choices, versions)
        missed += bar is not None and result.dense.median / result.time.median < bar
    if "model" in options.only and not options.quick:
        per_shape = {shape: best(Product("sparse24", *shape), 1, device, dtype).choice for shape in BLOCK}
        if options.write:
            write_table(options.write, device, list(per_shape.values()), versions)
        times = model_times(device, dtype, 1, per_shape)
        ratio = times["dense"].median / times["ours"].median
        columns = f"{_us(times['ours'])} | {_us(times['dense'])}"
        print(f"| linears of Llama-3-8B, 2:4 | all | 1 | as above | {columns} | | {_verdict(ratio, MODEL_BAR)} |")
        missed += ratio < MODEL_BAR
    return min(missed, 1)


def write_table(file: Path, device: torch.device, choices: Sequence[Choice], versions: dict[str, str]) -> None:
    """Write the choices as a table of this device. A table that is already there keeps its other choices."""
    name = torch.cuda.get_device_name(device)
    table = DispatchTable(name, arch_of(device), "measured", tuple(choices), versions, date.today().isoformat())
    if file.exists():
        table = table.over(DispatchTable.read(file))
    file.write_text(table.to_json())


if __name__ == "__main__":
    sys.exit(main())
