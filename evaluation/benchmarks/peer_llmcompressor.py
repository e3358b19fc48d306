"""The peer's side of `peers`: a pruner of llm-compressor's, run by the interpreter of its own environment.

    python peer_llmcompressor.py MODEL IDS.safetensors OUT sparsegpt|wanda

It imports nothing of paredown. Prints one JSON line: seconds from loading the model to having saved the result.
"""

import json
import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}


def main(model_folder: str, ids_file: str, out: str, method: str) -> None:
    ids = load_file(ids_file)["ids"]  # (sequences, length)
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=MODIFIERS[method](sparsity=0.5, mask_structure="2:4", targets=["Linear"], ignore=["re:.*lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
    )
    model.save_pretrained(out)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:5])
