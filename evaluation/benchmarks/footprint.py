"""Memory and overhead of compressing a model of about 1B parameters (2 GB in bf16) on a CPU.

    python -m paredown.evaluation.benchmarks.footprint [--work FOLDER] [--recipe wanda-2of4] [--threads 2]

Makes a random Llama of that shape once, compresses it in a fresh process with 16 x 512 calibration tokens, and reports
the peak of resident memory above the libraries beside the plan's prediction, and the time beside that of the model's
own forward passes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from paredown.compress.hub import load_tokenizer
from paredown.evaluation.reference import model_path

WINDOWS = ("calibration.sequences=16", "calibration.length=512", "evaluate.length=512")


def make_model(folder: Path, blocks: int) -> Path:
    """A random bf16 Llama of the 1B shape with `blocks` blocks and the bundled tokenizer, written block by block."""
    from transformers import LlamaConfig

    if (folder / "config.json").exists():
        return folder
    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=blocks, num_attention_heads=32,
        num_key_value_heads=4, max_position_embeddings=2048, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in range(blocks + 1):
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        tensors = _block(config, number) if number < blocks else _rest(config)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    load_tokenizer(model_path()).save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def _block(config: object, number: int) -> dict[str, torch.Tensor]:
    hidden, inner, keys = 2048, 5632, 4 * 64
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    prefix = f"model.layers.{number}."
    weights = {f"{prefix}{n}.weight": (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()}
    norms = ("input_layernorm", "post_attention_layernorm")
    return {**weights, **{f"{prefix}{n}.weight": torch.ones(hidden, dtype=torch.bfloat16) for n in norms}}


def _rest(config: object) -> dict[str, torch.Tensor]:
    big = {n: (torch.randn(32000, 2048) * 0.02).bfloat16() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    return {**big, "model.norm.weight": torch.ones(2048, dtype=torch.bfloat16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("out/footprint"))
    parser.add_argument("--recipe", default="wanda-2of4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--windows", type=int, default=16, help="evaluation windows of 512 tokens")
    chosen = parser.parse_args()
    model, out = make_model(chosen.work / f"model-{chosen.blocks}", chosen.blocks), chosen.work / "compressed"
    shutil.rmtree(out, ignore_errors=True)
    changes = [part for s in (*WINDOWS, f"evaluate.windows={chosen.windows}") for part in ("--set", s)]
    command = [sys.executable, "-m", "paredown.commands.app"]
    what = [str(model), "-r", chosen.recipe, *changes, "--json", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(chosen.threads)}
    planned = subprocess.run([*command, "plan", *what], check=True, capture_output=True, text=True, env=environment)
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
    print(f"total                {seconds['total']:.1f} s, of which forward passes {seconds['forward']:.1f} s")
    print(f"total / forward      {seconds['total'] / seconds['forward']:.2f}")
    print("seconds              " + ", ".join(f"{key} {value:.1f}" for key, value in seconds.items()))


if __name__ == "__main__":
    main()
