"""Train a small mixture of experts, on which methods that remove experts can be compared without a network.

    python -m paredown.evaluation.benchmarks.small_moe OUT [--steps 2000]

A Qwen3-MoE of 4.4 million parameters, 16 experts in each of 6 blocks, two for each token, with the tokenizer of the bundled
reference model, on the training side of the corpus `stdlib`. AdamW, and the load balancing loss of its family. OUT gets an
ordinary checkpoint in bfloat16. `quality --model OUT --rows reap@0.75 ...` compares methods on it.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

from paredown.compress.errors import PareError
from paredown.compress.text import stdlib_text
from paredown.compress.text.stdlib_text import Document
from paredown.evaluation.reference import model_path, train
from paredown.evaluation.terminal import show_note, step_bar

Documents = Callable[[str], list[Document]]  # of a split: train, calibration or evaluation


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    folder: Path  # to write the model to
    steps: int = 2000
    batch: int = 2  # windows in a step: few, since many small steps learn most of so little text
    rate: float = 4e-3  # peak learning rate
    warmup: float = 0.05  # share of the steps in which the learning rate rises
    balance: float = 0.01  # factor of the load balancing loss
    seed: int = 0
    context: int = 512  # tokens of a window
    hidden: int = 128
    blocks: int = 6
    experts: int = 16
    experts_of_a_token: int = 2
    width: int = 96  # of an expert


def build_model(plan: Plan, vocabulary: int, end_of_text: int) -> Qwen3MoeForCausalLM:
    """The untrained model, in float32."""
    config = Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=plan.hidden,
        moe_intermediate_size=plan.width,
        intermediate_size=plan.width * plan.experts_of_a_token,
        num_hidden_layers=plan.blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=plan.hidden // 4,
        num_experts=plan.experts,
        num_experts_per_tok=plan.experts_of_a_token,
        norm_topk_prob=True,
        router_aux_loss_coef=plan.balance,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    return Qwen3MoeForCausalLM(config).float()


def losses(model: Qwen3MoeForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean next-token loss in nats of ids (batch, context), and the load balancing loss, float32 () each."""
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids[:, :-1], output_router_logits=True)
    nll = nn.functional.cross_entropy(output.logits.float().flatten(0, 1), ids[:, 1:].flatten())
    return nll, output.aux_loss.float()


def run(plan: Plan, documents: Documents = stdlib_text.documents) -> dict[str, Any]:
    """Train a model as planned, write it to `plan.folder`, and return measured facts.

    Raises PareError if the folder is taken.
    """
    if plan.folder.exists() and (not plan.folder.is_dir() or any(plan.folder.iterdir())):
        raise PareError(f"{plan.folder} exists. Name another folder, or remove it.")
    torch.manual_seed(plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = build_model(plan, len(tokenizer), tokenizer.bos_token_id)
    show_note(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    windows = _windows(plan, tokenizer, documents)
    recent = _optimise(plan, model, windows)
    with torch.no_grad():
        held_out = train.token_stream(tokenizer, [d.text for d in documents("evaluation")])
        starts = torch.linspace(0, len(held_out) - plan.context, 32).long().tolist()
        parts = [held_out[start : start + plan.context][None] for start in starts]
        loss = math.fsum(float(losses(model.eval(), part)[0]) for part in parts) / len(parts)
    model.config.use_cache = True
    model.to(torch.bfloat16).save_pretrained(plan.folder)
    tokenizer.save_pretrained(plan.folder)
    return {
        "steps": plan.steps,
        "tokens_seen": plan.steps * plan.batch * plan.context,
        "last_training_loss": round(recent, 4),
        "loss": round(loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _windows(plan: Plan, tokenizer: Any, documents: Documents) -> Iterator[Tensor]:
    """Windows of the training split without end, (batch, context) int64, drawn as the reference model's are."""
    training = documents("train")
    library, tests = (
        train.token_stream(tokenizer, [d.text for d in training if train.is_side_matter(d) == side])
        for side in (False, True)
    )
    drawn = train.Plan(plan.folder, seed=plan.seed, batch=plan.batch, context=plan.context)
    return train.batches(drawn, library, tests, tokenizer.bos_token_id)


def _optimise(plan: Plan, model: Qwen3MoeForCausalLM, windows: Iterator[Tensor]) -> float:
    """Take the steps. Returns a moving average of the next-token loss."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95))
    recent = float("nan")
    with step_bar("training") as show:
        for step in range(plan.steps):
            for group in adam.param_groups:
                group["lr"] = plan.rate * train.rate_at(step / plan.steps, plan.warmup)
            nll, balance = losses(model, next(windows))
            (nll + plan.balance * balance).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adam.step()
            adam.zero_grad()
            recent = nll.item() if step == 0 else 0.98 * recent + 0.02 * nll.item()
            show(step + 1, plan.steps)
            if (step + 1) % 100 == 0:
                show_note(f"step {step + 1}: loss {recent:.3f}, balance {balance.item():.3f}")
    return recent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=Plan.steps)
    parser.add_argument("--experts", type=int, default=Plan.experts, help="in each block")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    chosen = parser.parse_args()
    try:
        facts = run(Plan(chosen.out, steps=chosen.steps, experts=chosen.experts, seed=chosen.seed))
    except PareError as fault:
        sys.exit(str(fault))
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
