"""How fast a model of a known shape decodes when the linears of its blocks are packed, beside the dense model.

    python -m paredown.evaluation.benchmarks.decode [--shape llama-3-8b] [--kind sparse24] [--batch 1 8 32] [--device cuda]

Weights are random, and both models hold the same: the dense one those that the packed ones unpack to, so that a pruned
model is held against its own zeros. They are made on the device and never written, for each shape once: layers hold copies.
Embeddings, norms and lm_head are dense and shared. Prints the tables of `paredown bench` (with --json one line of JSON
instead) and the ratio of decoding, dense time / ours, beside the bar for 2:4 at batch 1 of Llama-3-8B's shape on an H100;
there the exit status is 1 if it is missed.
"""

import argparse
import json
import sys
from typing import Any

import torch
from rich.console import Console
from torch import nn

from paredown.compress import fuse
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.checkpoint.source import set_tensor
from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device
from paredown.compress.numerics.factorize import largest_rank
from paredown.compress.storage.kinds import kind_of
from paredown.compress.storage.spec import Spec
from paredown.evaluation.benchmarks.shapes import DTYPE, SHAPES, random_parameter
from paredown.evaluation.schema import BenchResult
from paredown.evaluation.speed import Settings, measure
from paredown.evaluation.speed_report import render_bench
from paredown.evaluation.surroundings import surroundings
from paredown.evaluation.terminal import show_note, step_bar
from paredown.kernels.benchmark import MODEL_BAR
from paredown.kernels.tuning import Product, random_product

KINDS = ("sparse24", "pifa", "lowrank")
BAR_IS_FOR = ("llama-3-8b", "sparse24", 1)  # and an H100


@torch.no_grad()
def make_models(shape: str, kind: str, kept: float, device: torch.device) -> dict[str, Any]:
    """`{model, against}`: the packed model, fused, and the dense one of the same weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shape])
    against = skeleton(config, {}, DTYPE)
    specs = {
        name: spec_of(kind, (module.out_features, module.in_features), kept)
        for name, module in against.named_modules()
        if isinstance(module, nn.Linear) and "layers." in name
    }
    model = skeleton(config, specs, DTYPE)
    torch.manual_seed(0)
    made: dict[Product, Any] = {}  # of each shape one: its copies lie in memory of their own
    for name, spec in specs.items():
        out, inner = spec.shape
        product = Product(kind, out, inner, spec.rank or 0)
        if product not in made:
            made[product] = random_product(product, device, DTYPE)
        tensors, dense = made[product]
        set_tensor(against, f"{name}.weight", dense.clone())  # (out, in)
        # an operator takes more than a checkpoint holds: how its weights are grouped
        for part, tensor in zip(kind_of(kind).tensors, tensors, strict=False):
            set_tensor(model, f"{name}.{part}", tensor.clone())  # aligned, as a checkpoint's is: some are views
    for name, parameter in list(against.named_parameters()):
        if parameter.is_meta and name not in against.all_tied_weights_keys:
            tensor = random_parameter(parameter, device)
            for one in (model, against):
                set_tensor(one, name, tensor)
    for one in (model, against):
        one.tie_weights()
        one.to(device)  # the rotary tables: the class computed them on the CPU
    fuse(model, device.type)
    return {"model": model, "against": against}


def spec_of(kind: str, shape: tuple[int, int], kept: float) -> Spec:
    """How a weight (out, in) is stored that keeps a share of its numbers."""
    if kind == "sparse24":
        if kept != 0.5:
            raise PareError(f"--kept {kept:g}: 2:4 keeps half of its weights. Leave it out, or name another --kind.")
        return Spec(kind, shape, values=shape[0] * shape[1] // 2)
    rank = largest_rank(kind, shape, kept * shape[0] * shape[1])
    if not rank or kept >= 1:
        raise PareError(f"--kept {kept:g}: wanted a share below 1 that leaves {[*shape]} as {kind} at least rank 1.")
    return Spec(kind, shape, rank=rank)


def verdict(ratio: float, shape: str, kind: str, batch: int, device: str) -> tuple[str, bool]:
    """The ratio of decoding beside the bar, and whether the bar was there to be met and is missed."""
    asked = (shape, kind, batch) == BAR_IS_FOR and "H100" in device
    missed = asked and ratio < MODEL_BAR
    told = ("MISSED" if missed else "met") if asked else "not asked of this run"
    where = "{}, {}, batch {}, on an H100".format(*BAR_IS_FOR)
    return f"decoding, dense time / ours: {ratio:.2f}x; bar {MODEL_BAR:.2f}x ({where}): {told}", missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b", choices=SHAPES)
    parser.add_argument("--kind", default="sparse24", choices=KINDS)
    parser.add_argument("--kept", type=float, default=0.5, help="share of the numbers of each packed weight")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences at once")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", action="store_true", help="as `paredown bench --json`, in one line")
    chosen = parser.parse_args()
    try:
        result = run(chosen)
    except PareError as fault:
        sys.exit(f"error: {fault}")
    print(json.dumps(result)) if chosen.json else Console().print(render_bench(result))
    any_missed = False
    for row in result["end_to_end"]:
        assert row["ratio"] is not None  # both models were timed
        told, missed = verdict(
            row["ratio"]["decode"], chosen.shape, chosen.kind, row["batch"], result["device"]["name"]
        )
        print(told)
        any_missed |= missed
    sys.exit(int(any_missed))


def run(chosen: argparse.Namespace) -> BenchResult:
    """As `paredown bench --json` prints it."""
    device = pick_device(chosen.device)
    asked = Settings(tuple(chosen.batch), chosen.context, chosen.decode, chosen.repeats)
    settings, notes = asked.within(SHAPES[chosen.shape]["max_position_embeddings"])
    show_note(f"making both models on {device}")
    models = make_models(chosen.shape, chosen.kind, chosen.kept, device)
    with step_bar("measuring") as bar:
        result = measure(models, settings, bar, show_note)
    return {
        "schema": 1,
        "model": f"{chosen.shape} as {chosen.kind}",
        "against": f"{chosen.shape}, dense",
        "dtype": str(DTYPE).removeprefix("torch."),
        **surroundings(device),
        **result,
        "notes": [*notes, *result["notes"]],
    }


if __name__ == "__main__":
    main()
