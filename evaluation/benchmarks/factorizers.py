"""Low-rank methods side by side on the same tokens, what each part of ours is worth, and how long a block takes.

    python -m paredown.evaluation.benchmarks.factorizers [--model FOLDER] [--kept 0.9,0.8,0.6,0.4] [--json FILE]
    python -m paredown.evaluation.benchmarks.factorizers --speed [--device cuda] [--shape llama-3-8b]

The first prints the rise of log perplexity over the dense model, with its paired bootstrap error, and the share of the
targeted parameters counted from what was written. Results are kept in --json, and a second run goes on from there.
The second times the factorization of every linear of one block, as the methods do it, random weights and moments.
For a whole model in bounded memory: python -m paredown.evaluation.benchmarks.footprint --recipe svd-llm-80
    [--shape llama-3-8b --device cuda]
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paredown.compress import compress
from paredown.compress.numerics.factorize import factorize, largest_rank
from paredown.compress.numerics.metric import Metric, Target
from paredown.compress.recipe import Recipe
from paredown.evaluation.benchmarks.shapes import SHAPES, linears
from paredown.evaluation.gauges import wait
from paredown.evaluation.reference import model_path

# label -> method, options, further keys of the recipe
OURS: dict[str, Any] = {"method": "paredown_lowrank"}
PAPERS: dict[str, dict[str, Any]] = {
    "SVD": {"method": "svd"},
    "FWSVD": {"method": "fwsvd"},
    "ASVD": {"method": "asvd"},
    "ASVD, by sensitivity": {"method": "asvd", "allocation": {"strategy": "sensitivity"}},
    "LoRAP (AWSVD)": {"method": "lorap"},
    "LLM-ROM, affine": {"method": "rom"},
    "SVD-LLM": {"method": "svd_llm"},
    "SVD-LLM, theoretical loss": {"method": "svd_llm", "allocation": {"strategy": "theoretical_loss"}},
    "two-sided Fisher": {"method": "fisher_svd"},
    "two-sided Fisher, global": {"method": "fisher_svd", "allocation": {"strategy": "global"}},
    "ours": OURS,
    "ours, blocks reconstructed": {**OURS, "reconstruct": {}},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "ours, hardly damped": {**OURS, "options": {"damping": 0.01, "output_damping": 0.001}},
    "ours without two-sided": {**OURS, "options": {"two_sided": False}},
    "ours without affine": {**OURS, "options": {"affine": False}},
    "ours without regression": {**OURS, "options": {"regression": False}},
    "ours without PIFA": {**OURS, "options": {"storage": "factors"}},
    "ours without global allocation": {**OURS, "allocation": {"strategy": "uniform"}},
    "SVD-LLM + affine": {"method": "rom"},
    "SVD-LLM + PIFA": {"method": "svd_llm", "options": {"storage": "pifa"}},
    "SVD-LLM + regression": {
        "method": "paredown_lowrank",
        "options": {"two_sided": False, "affine": False, "storage": "factors"},
        "allocation": {"strategy": "uniform"},
    },
    "SVD-LLM + global": {"method": "svd_llm", "allocation": {"strategy": "global"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a model folder; default: the bundled model")
    parser.add_argument("--kept", default="0.9,0.8,0.6,0.4")
    parser.add_argument("--rows", default="papers", choices=["papers", "ablations"])
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None, help="evaluation windows; default: the whole split")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--precision", default="float64", choices=["float64", "float32"], help="methods use float64")
    parser.add_argument("--repeats", type=int, default=3, help="of --speed")
    chosen = parser.parse_args()
    if chosen.speed:
        precision = getattr(torch, chosen.precision)
        block_seconds(linears(chosen.shape), torch.device(chosen.device), precision, repeats=chosen.repeats)
        return
    rows = PAPERS if chosen.rows == "papers" else ABLATIONS
    shares = [float(share) for share in chosen.kept.split(",")]
    found = json.loads(chosen.json.read_text()) if chosen.json and chosen.json.exists() else {}
    for share in shares:
        for label, raw in rows.items():
            key = f"{label} @ {share}"
            if key not in found:
                found[key] = measure(chosen, raw, share)
                print(key, found[key], flush=True)
                if chosen.json:
                    chosen.json.write_text(json.dumps(found, indent=1))
    Console(width=200).print(_table(rows, shares, found))


def measure(chosen: argparse.Namespace, raw: dict[str, Any], kept: float) -> dict[str, Any]:
    recipe = Recipe.parse(
        {
            **raw,
            "options": {**raw.get("options", {}), "kept": kept},
            "calibration": {"source": "stdlib", "sequences": chosen.sequences, "length": 512, "seed": 0},
            "evaluate": {"perplexity": ["stdlib"], "length": 512, "windows": chosen.windows},
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        report = compress(chosen.model or str(model_path()), recipe, Path(folder) / "out", device=chosen.device)
    entry, counts = report["evaluation"][0], report["parameters"]
    return {
        "kept": counts["kept"] / counts["targeted"],
        "perplexity": entry["after"]["token_perplexity"],
        "dense": entry["before"]["token_perplexity"],
        "rise": entry["paired_delta"]["log_ratio"],
        "stderr": entry["paired_delta"]["stderr"],
        "megabytes": report["bytes"]["after"] / 1e6,
        "seconds": report["seconds"]["total"],
    }


def _table(rows: dict[str, Any], shares: list[float], found: dict[str, Any]) -> Table:
    table = Table("rise of log perplexity", *(f"kept {share}" for share in shares))
    for label in rows:
        cells = [found[f"{label} @ {share}"] for share in shares]
        table.add_row(label, *(f"{c['rise']:.4f} ± {c['stderr']:.4f} ({c['kept']:.3f})" for c in cells))
    return table


def block_seconds(
    shapes: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, kept: float = 0.8, repeats: int = 3
) -> None:
    """Prints in both metrics the time of each linear, and the median of factoring all linears of a block with its spread."""
    for name in ("input only", "two-sided"):
        taken = []
        for _ in range(repeats):
            seconds = 0.0
            for out, inner in shapes:
                weight, metric = _random((out, inner), device, dtype, two_sided=name == "two-sided")
                rank = largest_rank("pifa", (out, inner), kept * out * inner)
                wait(device)
                began = time.perf_counter()
                factorize(Target(weight), metric, lambda losses, rank=rank: rank)  # type: ignore[misc]
                wait(device)
                linear = time.perf_counter() - began
                print(f"  {out} x {inner}, {name}: {linear:.2f} s", flush=True)
                seconds += linear
            taken.append(seconds)
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        print(f"one block, {name}: {statistics.median(taken):.2f} s ({spread}) on {device}, {str(dtype)[6:]}")


def _random(
    shape: tuple[int, int], device: torch.device, dtype: torch.dtype, two_sided: bool
) -> tuple[torch.Tensor, Metric]:
    out, inner = shape
    weight = torch.randn(out, inner, dtype=dtype, device=device)
    data = torch.randn(2 * inner, inner, dtype=dtype, device=device)
    moment, small = data.T @ data / len(data), min(out, inner)
    if not two_sided:
        return weight, Metric(moment)
    folded = torch.randn(2 * small, small, dtype=dtype, device=device)
    diagonal = torch.ones(out, dtype=dtype, device=device)
    return weight, Metric(moment, folded.T @ folded / len(folded), diagonal)


if __name__ == "__main__":
    main()
