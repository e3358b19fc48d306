"""What vLLM makes of a packed checkpoint and of its dense export: the same answers, how fast, and how many bytes of weights.

    python -m paredown.evaluation.benchmarks.serving OUT [--batch 1 8 32] [--prompt 256] [--tokens 64] [--repeats 5]

Each is served by a process of its own, compiled and, on a GPU, with CUDA graphs, as `vllm serve` does; one after the other,
since vLLM takes the whole device. Prompts are random tokens, which vLLM has in its cache when time is taken: that is of
decoding. Prints one JSON object a line: the bytes of weights and, for each batch, tokens per second of repeated runs; last
the largest difference of a log probability of the prompts between the two, and the share of greedy tokens that are equal up
to the first that differs. vLLM 0.32: pip install 'paredown[serve]'.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from paredown.compress import export

FEW = 4  # prompts whose log probabilities and answers are compared
ANSWERS = '{"answers"'  # begins the line that is not for people
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a packed checkpoint")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32], help="sequences at once")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each")
    parser.add_argument("--tokens", type=int, default=64, help="to generate after each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", help="of the products")
    parser.add_argument("--form", choices=("packed", "dense"), help="serve OUT as it is, under this name, and no other")
    chosen = parser.parse_args()
    if chosen.form:
        for record in served(chosen):
            print(json.dumps(record), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        export(chosen.out, dense, "dense")
        found = {form: in_process(form, path, chosen) for form, path in (("packed", chosen.out), ("dense", dense))}
    print(json.dumps(compared(found["packed"], found["dense"])))


def in_process(form: str, folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run this command for one folder, print what it prints, and give its answers."""
    command = [sys.executable, "-m", "paredown.evaluation.benchmarks.serving", str(folder), "--form", form]
    for name in ("batch", "prompt", "tokens", "repeats", "dtype"):
        value = getattr(chosen, name)
        command += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    answers: dict[str, Any] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**SETTINGS, **os.environ}) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(ANSWERS):
                answers = json.loads(line)["answers"]
            else:
                print(line, end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)
    return answers


def served(chosen: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record after another: the bytes of weights, the speed at each batch, the answers."""
    from vllm import LLM, SamplingParams

    from paredown.compress.serving.vllm_plugin import register

    register()
    length = chosen.prompt + chosen.tokens
    options = {"dtype": chosen.dtype, "max_model_len": length, "max_num_seqs": max(chosen.batch)}
    llm = LLM(str(chosen.out), skip_tokenizer_init=True, **options)
    yield {"form": chosen.form, "weight_bytes": llm.apply_model(weight_bytes)[0]}
    most, rows = llm.model_config.get_vocab_size(), max(*chosen.batch, FEW)
    prompts = torch.randint(3, most, (rows, chosen.prompt), generator=torch.Generator().manual_seed(0))
    asked = [{"prompt_token_ids": ids} for ids in prompts.tolist()]
    timed = SamplingParams(temperature=0, max_tokens=chosen.tokens, ignore_eos=True, detokenize=False)
    for batch in chosen.batch:
        seconds = []
        for _ in range(chosen.repeats + 1):  # the first warms up
            began = perf_counter()
            llm.generate(asked[:batch], timed, use_tqdm=False)
            seconds.append(perf_counter() - began)
        speeds = sorted(batch * chosen.tokens / one for one in seconds[1:])
        spread = {"median": median(speeds), "least": speeds[0], "most": speeds[-1]}
        yield {"form": chosen.form, "batch": batch, "tokens_per_second": spread}
    told = SamplingParams(temperature=0, max_tokens=chosen.tokens, ignore_eos=True, detokenize=False, prompt_logprobs=0)
    yield {"answers": answers_of(llm.generate(asked[:FEW], told, use_tqdm=False))}


def answers_of(outputs: Any) -> dict[str, Any]:
    """The log probabilities of the prompts' tokens but the first, and the tokens after them."""
    logprobs = [
        [places[token].logprob for token, places in zip(o.prompt_token_ids, o.prompt_logprobs, strict=True) if places]
        for o in outputs
    ]
    return {"logprobs": logprobs, "tokens": [list(o.outputs[0].token_ids) for o in outputs]}


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers, those that share memory once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def compared(packed: dict[str, Any], dense: dict[str, Any]) -> dict[str, float]:
    """The largest and the mean difference of a log probability, and the share of answers until the first other token."""
    differences = (torch.tensor(packed["logprobs"]) - torch.tensor(dense["logprobs"])).abs()
    same = torch.tensor(packed["tokens"]) == torch.tensor(dense["tokens"])
    agreed = float(same.cumprod(1).double().mean())
    return {
        "largest_difference": float(differences.max()),
        "mean_difference": float(differences.mean()),
        "agreed": agreed,
    }


if __name__ == "__main__":
    main()
