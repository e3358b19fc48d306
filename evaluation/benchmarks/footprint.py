"""Memory and time of compressing a random model of a known shape, by default of about 1B parameters on a CPU.

    python -m paredown.evaluation.benchmarks.footprint [--recipe wanda-2of4] [--shape llama-1b] [--device cpu] [--threads 2]

Makes the model once, compresses it in a fresh process, and reports the peak of resident memory above the libraries
beside the plan's prediction, and the time beside that of the model's own forward passes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import torch
from safetensors.torch import save_file

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.skeleton import skeleton
from paredown.evaluation.benchmarks.shapes import DTYPE, SHAPES, random_parameter
from paredown.evaluation.reference import model_path


def make_model(folder: Path, shape: str = "llama-1b", blocks: int | None = None, device: str = "cpu") -> Path:
    """A random bf16 Llama of that shape (or with fewer blocks) and the bundled tokenizer, written block by block.

    The device draws the weights: a GPU is done with 8B of them in seconds.
    """
    from transformers import LlamaConfig

    if (folder / "config.json").exists():
        return folder
    config = LlamaConfig(**SHAPES[shape], dtype=DTYPE, architectures=["LlamaForCausalLM"])
    config.num_hidden_layers = blocks or config.num_hidden_layers
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    parameters = skeleton(config, {}, DTYPE).named_parameters()
    for part, members in groupby(parameters, lambda named: named[0].partition(".layers.")[2].partition(".")[0]):
        file = f"model-{part or 'rest'}-{len(weight_map)}.safetensors"
        tensors = {name: random_parameter(parameter, torch.device(device)).cpu() for name, parameter in members}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load_tokenizer(model_path()).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/footprint"))
    parser.add_argument("--recipe", default="wanda-2of4")
    parser.add_argument("--shape", default="llama-1b", choices=SHAPES)
    parser.add_argument("--blocks", type=int, default=None, help="fewer than the shape has")
    parser.add_argument("--make", action="store_true", help="make the model, and no more")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="of all windows, in tokens")
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows")
    chosen = parser.parse_args()
    name = f"{chosen.shape}-{chosen.blocks or 'whole'}"
    model, out = make_model(chosen.work / name, chosen.shape, chosen.blocks, chosen.device), chosen.work / "compressed"
    if chosen.make:
        return
    for left in (out, out.with_name(out.name + ".partial")):  # a stopped run would go on and not be measured whole
        shutil.rmtree(left, ignore_errors=True)
    settings = {
        "calibration.sequences": chosen.sequences, "calibration.length": chosen.length,
        "evaluate.length": chosen.length, "evaluate.windows": chosen.windows,
    }  # fmt: skip
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "paredown.commands.app"]
    what = [str(model), "-r", chosen.recipe, *changes, "--json", "--device", chosen.device]
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    planned = subprocess.run(
        [*command, "plan", "--no-probe", *what], check=True, capture_output=True, text=True, env=environment
    )
    done = subprocess.run(
        [*command, "compress", *what, "-o", str(out)], check=True, stdout=subprocess.PIPE, text=True, env=environment
    )
    plan, report = json.loads(planned.stdout), json.loads(done.stdout)
    peak = report["peak_memory_bytes"]["host"] - report["memory_base_bytes"]
    seconds = report["seconds"]
    sizes = f"{plan['bytes_before'] / 1e6:.0f} MB -> {report['bytes']['after'] / 1e6:.0f} MB"
    planned_peak = f"planned {plan['memory'] / 1e6:.0f} MB, planned / measured {plan['memory'] / peak:.2f}"
    print(f"parameters           {report['parameters']['total']:,}")
    print(f"weights on disk      {sizes}")
    print(f"libraries, resident  {report['memory_base_bytes'] / 1e6:.0f} MB")
    print(f"peak above them      {peak / 1e6:.0f} MB ({planned_peak})")
    if device_peak := report["peak_memory_bytes"].get("device"):
        print(f"peak on {chosen.device:13}{device_peak / 1e6:.0f} MB")
    print(f"total                {seconds['total']:.1f} s, of which forward passes {seconds['forward']:.1f} s")
    print(f"total / forward      {seconds['total'] / seconds['forward']:.2f}")
    print("seconds              " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()))


if __name__ == "__main__":
    main()
