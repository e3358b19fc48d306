"""Does a GPU compress as the CPU does? Six recipes on both, on the same text, and what came out compared.

    python -m paredown.evaluation.benchmarks.devices [--device cuda] [--shape reference] [--recipes wanda-2of4 ...]

Both work in bfloat16 and add in another order, so that hidden states differ in their last bits. What may follow from that:
a mask decides otherwise where two scores nearly tie, and a factor turns a little; the model's loss hardly moves. TOLERANCES
are about three times the differences that the same recipes show on a CPU between activations in bfloat16 and in float32,
where roundings differ at least as much. Prints one JSON object a line; the exit status is 1 if a recipe is out of them.
"""

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import resolve_job
from paredown.compress.machine import pick_device
from paredown.compress.recipe import Recipe
from paredown.compress.run.open import open_source
from paredown.compress.run.pipeline import Run
from paredown.compress.run.record import write_record
from paredown.compress.run.texts import read_texts
from paredown.compress.text.windows import Windows
from paredown.evaluation.benchmarks.footprint import make_model
from paredown.evaluation.benchmarks.shapes import SHAPES
from paredown.evaluation.reference import model_path


@dataclass(frozen=True)
class Tolerance:
    """How far both may differ.

    dense, loss: the dense and the compressed model's loss, in nats per token. masks: the smallest share of weights that both
    keep or both drop. weights: the relative difference (Frobenius norm) of the compressed weights, unpacked.
    """

    loss: float
    weights: float | None  # None: not compared
    masks: float | None = None
    dense: float = 0.002

    def loss_at(self, rise: float) -> float:
        """What a loss may differ by that compression raises by `rise`: a ruined model's differs by a share of that."""
        return max(self.loss, 0.02 * abs(rise))


# a mask that decides otherwise swaps whole weights, and SparseGPT lets the columns to the right follow; CUR takes other
# columns of the weight where two matter alike, which changes all of it
TOLERANCES = {
    "wanda-2of4": Tolerance(0.01, 0.1, 0.995),
    "sparsegpt-2of4": Tolerance(0.03, 0.6, 0.87),
    "rom-80": Tolerance(0.01, 0.03),
    "curing": Tolerance(0.02, None),
    "paredown-lowrank-80": Tolerance(0.01, 0.08),
    "paredown-lowrank-tuned-80": Tolerance(0.01, 0.13),
}
# what makes a recipe short enough, and fit a model of few blocks
SHORTER = {
    "paredown-lowrank-tuned-80": ["reconstruct.steps=10"],
    "curing": ["options.blocks=null", "options.max_rank=32"],
}


@dataclass(frozen=True)
class Compressed:
    """Losses in nats per token, seconds of the walk, and the checkpoint's folder."""

    dense: float
    loss: float
    seconds: float
    folder: Path
    layers: tuple[str, ...]  # names of the modules whose weights were compressed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--against", default="cpu", help="the device to compare with")
    parser.add_argument("--dtype", default="auto", help="of --device; float32 shows what rounding alone changes")
    parser.add_argument("--shape", default="reference", choices=["reference", *SHAPES], help="or a random model")
    parser.add_argument("--recipes", nargs="+", choices=TOLERANCES, default=[*TOLERANCES])
    parser.add_argument("--sequences", type=int, default=8, help="calibration windows")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows")
    parser.add_argument("--length", type=int, default=256, help="of all windows, in tokens")
    chosen = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = model_path() if chosen.shape == "reference" else make_model(work / "model", chosen.shape)
        recipes = {name: recipe_of(name, chosen) for name in chosen.recipes}
        source = open_source(str(model), None, "cpu")
        windows, evaluations, _ = read_texts(next(iter(recipes.values())), source, load_tokenizer(source.folder))
        for name, recipe in recipes.items():
            ours, theirs = (
                compressed(model, recipe, work / f"{name}-{side}", where, dtype, windows, evaluations)
                for side, where, dtype in (("ours", chosen.device, chosen.dtype), ("theirs", chosen.against, "auto"))
            )
            row = {"recipe": name, **compare(ours, theirs, TOLERANCES[name].masks is not None)}
            row["wrong"] = wrong(row, TOLERANCES[name])
            print(json.dumps(row), flush=True)
            failed += bool(row["wrong"])
    return min(failed, 1)


def recipe_of(name: str, chosen: argparse.Namespace) -> Recipe:
    """The shipped recipe, on as much text as was chosen."""
    text = [
        f"calibration.sequences={chosen.sequences}",
        f"calibration.length={chosen.length}",
        f"evaluate.windows={chosen.windows}",
        f"evaluate.length={chosen.length}",
    ]
    return Recipe.load(name, [*text, *SHORTER.get(name, [])])


def compressed(
    model: Path, recipe: Recipe, out: Path, device: str, dtype: str, windows: Windows, evaluations: list[Windows]
) -> Compressed:
    """Compress the model on a device, as `paredown compress` does, without its report and verification."""
    began = perf_counter()
    job = resolve_job(open_source(str(model), None, str(pick_device(device)), dtype), recipe, "packed")
    with CheckpointWriter(out) as writer:
        result = Run(job, windows, evaluations, writer).run()
        write_record(writer, job, result, windows)
        writer.commit()
    dense, loss = (math.log(result.evaluation[0][when]["token_perplexity"]) for when in ("before", "after"))
    return Compressed(dense, loss, perf_counter() - began, out, tuple(layer["name"] for layer in result.layers))


@torch.no_grad()
def compare(ours: Compressed, theirs: Compressed, masks: bool) -> dict[str, Any]:
    """The differences that a `Tolerance` bounds; seconds are those of each device."""
    equal, count, square, size = 0, 0, 0.0, 0.0
    first, second = (transformers_plugin.load(side.folder) for side in (ours, theirs))
    for name in ours.layers:
        one, other = (model.get_submodule(name).weight.float() for model in (first, second))  # (out, in)
        equal, count = equal + int(((one != 0) == (other != 0)).sum()), count + one.numel()
        square, size = square + float((one - other).norm() ** 2), size + float(other.norm() ** 2)
    return {
        "dense": ours.dense - theirs.dense,
        "loss": ours.loss - theirs.loss,
        "rise": theirs.loss - theirs.dense,
        "masks": equal / count if masks else None,
        "weights": (square / size) ** 0.5,
        "seconds": ours.seconds,
        "against_seconds": theirs.seconds,
    }


def wrong(row: dict[str, Any], allowed: Tolerance) -> list[str]:
    """What is out of its tolerance, in words."""
    faults = [
        f"{what} differs by {row[key]:+.4f}, more than {limit:g} nats per token"
        for key, what, limit in (
            ("dense", "the dense loss", allowed.dense),
            ("loss", "the loss", allowed.loss_at(row["rise"])),
        )
        if not abs(row[key]) <= limit
    ]
    if allowed.masks is not None and not row["masks"] >= allowed.masks:
        faults.append(f"{row['masks']:.2%} of the mask agrees, less than {allowed.masks:.1%}")
    if allowed.weights is not None and not row["weights"] <= allowed.weights:
        faults.append(f"weights differ by {row['weights']:.1%}, more than {allowed.weights:.0%}")
    return faults


if __name__ == "__main__":
    sys.exit(main())
