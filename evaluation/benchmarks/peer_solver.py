"""The peer's side of `solvers --against llmcompressor`: its SparseGPT on one weight, in an environment of its own.

    python peer_solver.py WEIGHT.safetensors OUT.safetensors

WEIGHT holds `weight` (out, in) and `hessian` (in, in), float32. For each line of standard input, JSON with sparsity, n, m
(both 0 for a fraction) and damping, it prunes once, writes `pruned` to OUT and prints the seconds. It imports nothing of
paredown.
"""

import json
import sys
import time

import torch
from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import sparsify_weight
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(given: str, out: str) -> None:
    tensors = load_file(given)
    weight, hessian = tensors["weight"], tensors["hessian"]
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    print("ready", flush=True)
    for line in sys.stdin:
        asked, hessians = json.loads(line), {linear: hessian.clone()}  # which it overwrites
        began = time.perf_counter()
        _, pruned = sparsify_weight(
            linear, hessians, asked["sparsity"], asked["m"] - asked["n"], asked["m"], 128, asked["damping"], False
        )
        seconds = time.perf_counter() - began
        save_file({"pruned": pruned.contiguous()}, out)
        print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
