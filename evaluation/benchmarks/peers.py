"""Our SparseGPT or Wanda beside llm-compressor's: same model, same tokens, same number of threads, in turns.

python -m paredown.evaluation.benchmarks.peers --peer-python peers/bin/python [--method wanda] [--model FOLDER]
    [--calibration TEXT --text TEXT] [--repeats 3]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.numerics.perplexity import perplexity
from paredown.compress.run.open import max_length, open_source
from paredown.compress.run.scoring import score
from paredown.compress.text.corpora import load_corpus
from paredown.compress.text.windows import Windows, calibration_windows, evaluation_windows
from paredown.evaluation.benchmarks.footprint import make_model
from paredown.evaluation.reference import model_path

PEER = Path(__file__).with_name("peer_llmcompressor.py")
ENVIRONMENT = """Name the peer's interpreter with --peer-python. Its environment stands by itself:

    python3 -m venv peers
    peers/bin/pip install torch==2.13.0
    peers/bin/pip install llmcompressor==0.14.0.1
    python -m paredown.evaluation.benchmarks.peers --peer-python peers/bin/python
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", type=Path, help="interpreter of an environment with llmcompressor")
    parser.add_argument("--model", help="a model folder; default: the bundled model", default=None)
    parser.add_argument("--method", default="sparsegpt", choices=["sparsegpt", "wanda"])
    parser.add_argument("--calibration", default="stdlib", metavar="TEXT")
    parser.add_argument("--text", default="stdlib", help="what scores")
    parser.add_argument("--blocks", type=int, help="instead: a random Llama of the 1B shape with so many blocks")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    chosen = parser.parse_args()
    if chosen.peer_python is None:
        sys.exit(ENVIRONMENT)
    with tempfile.TemporaryDirectory() as work:
        run(chosen, Path(work))


def run(chosen: argparse.Namespace, work: Path) -> None:
    model = chosen.model or str(model_path())
    if chosen.blocks:
        model = str(make_model(work / "model", blocks=chosen.blocks))
    source = open_source(model, None, "cpu", "auto")
    tokenizer = load_tokenizer(source.folder)
    longest = max_length(source)
    drawn = calibration_windows(
        load_corpus(chosen.calibration, "calibration"), tokenizer, chosen.sequences, chosen.length, 0, longest
    )
    save_file({"ids": drawn.ids}, work / "ids.safetensors")
    scored = evaluation_windows(load_corpus(chosen.text, "evaluation"), tokenizer, chosen.length, longest, 64)
    taken: dict[str, list[tuple[float, float]]] = {"paredown": [], "llm-compressor": []}
    for repeat in range(chosen.repeats):
        for side in taken:  # in turns, so that a busy minute of the machine falls on both
            out = work / side
            shutil.rmtree(out, ignore_errors=True)
            taken[side].append(_time(_command(side, chosen, model, work, out), chosen.threads, out))
            print(f"{side} {repeat + 1}/{chosen.repeats}: {taken[side][-1][0]:.1f} s", file=sys.stderr, flush=True)
    Console().print(_table(f"{chosen.method} 2:4", taken, {side: _score(work / side, scored) for side in taken}))


def _command(side: str, chosen: argparse.Namespace, model: str, work: Path, out: Path) -> list[str]:
    if side == "llm-compressor":
        return [str(chosen.peer_python), str(PEER), model, str(work / "ids.safetensors"), str(out), chosen.method]
    settings = [f"calibration.sequences={chosen.sequences}", f"calibration.length={chosen.length}"]
    settings += [f"calibration.source={json.dumps(chosen.calibration)}", "evaluate.perplexity=[]"]
    changes = [part for setting in settings for part in ("--set", setting)]
    return [
        sys.executable, "-m", "paredown.commands.app", "compress", model, "-r", f"{chosen.method}-2of4", "-o", str(out),
        "--format", "dense", "--device", "cpu", *changes,
    ]  # fmt: skip


def _time(command: list[str], threads: int, out: Path) -> tuple[float, float]:
    """Seconds of the whole process, and those from loading the model to the saved result as the side itself tells."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    whole = time.perf_counter() - began
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    report = out / "report.json"
    if report.exists():
        return whole, json.loads(report.read_text())["seconds"]["total"]
    return whole, json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def _score(folder: Path, windows: Windows) -> dict[str, float]:
    source = open_source(str(folder), None, "cpu", "auto")
    return perplexity(score(source, [windows], lambda done, total: None)[0])


def _table(title: str, taken: dict[str, list[tuple[float, float]]], scores: dict[str, Any]) -> Table:
    table = Table(
        title, "whole process, s", "load to saved, s", "perplexity",
        title=f"torch {torch.__version__}, medians (least to most)", title_justify="left",
    )  # fmt: skip
    for side, runs in taken.items():
        whole, inner = zip(*runs, strict=True)
        table.add_row(side, _spread(whole), _spread(inner), f"{scores[side]['token_perplexity']:.3f}")
    ours, theirs = taken.values()
    ratios = (statistics.median(b[i] / a[i] for a, b in zip(ours, theirs, strict=True)) for i in (0, 1))
    table.add_row("theirs / ours", *(f"{ratio:.2f}" for ratio in ratios), "")
    return table


def _spread(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    main()
