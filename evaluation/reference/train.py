"""Train the bundled reference model: a small Llama and its byte-level BPE, on the training side of the corpus stdlib.

    python -m paredown.evaluation.reference.train -o FIRST --minutes 46
    python -m paredown.evaluation.reference.train -o FOLDER --minutes 24 --start FIRST

Muon (Jordan et al., 2024) turns the matrices, AdamW the embedding and the norms. The budget is wall time: the learning
rate is a function of the share of it that is spent, so a faster machine sees more tokens and ends on the same schedule.
The weights written are an average over the last steps, in bfloat16.

`--start` goes on from an earlier run with AdamW for everything, the optimizer most published models were trained with.
After Muon alone Wanda did worse than magnitude at 2:4, after AdamW better: the README beside this file has the figures.
"""

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paredown.compress.text import stdlib_text
from paredown.compress.text.stdlib_text import Document

VOCABULARY, CONTEXT = 4096, 512
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Plan:
    """What one run does; rates are peaks, `minutes` is wall time from the first step to the last."""

    folder: Path
    minutes: float = 55.0
    seed: int = 0
    batch: int = 16
    muon_rate: float = 0.02
    adam_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: float = 0.02
    average: float = 0.995
    tests: float = 0.3
    save_every_s: float = 240.0
    start: Path | None = None  # go on from this checkpoint, with AdamW alone


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that gives every string back exactly and adds no special tokens of its own accord."""
    bpe = Tokenizer(models.BPE())
    # Digits stand alone, and runs of blanks keep whole: source is indented.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(end_of_text: int) -> LlamaForCausalLM:
    """The untrained model: 6.9 million parameters, grouped-query attention, tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    return LlamaForCausalLM(config).float()


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """All documents in one row of ids, each opened by the end-of-text token, (tokens,) int64."""
    opening = tokenizer.bos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in (opening, *one.ids)], dtype=torch.int64)


def batches(plan: Plan, library: Tensor, tests: Tensor, opening: int) -> Iterator[Tensor]:
    """Windows at random offsets, (batch, context) int64: a share `plan.tests` of them from tests and other side matter.

    Half of the windows begin with the end-of-text token, so that the model knows both a fresh start and a cut one.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    reach = torch.arange(CONTEXT)
    while True:
        from_tests = torch.rand(plan.batch, generator=generator) < (plan.tests if len(tests) > CONTEXT else 0.0)
        place = torch.rand(plan.batch, generator=generator)
        rows = []
        for chosen, share in zip(from_tests.tolist(), place.tolist(), strict=True):
            stream = tests if chosen else library
            rows.append(stream[int(share * (len(stream) - CONTEXT)) + reach])
        window = torch.stack(rows)  # (batch, context)
        window[torch.rand(plan.batch, generator=generator) < 0.5, 0] = opening
        yield window


def optimizers(plan: Plan, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the tied embedding and the norms; peak rates in `peak`."""
    if plan.start is not None:
        matrices = [p for p in model.parameters() if p.ndim == 2]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return [_peaked(torch.optim.AdamW(groups, lr=plan.adam_rate, betas=(0.9, 0.95)))]
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    muon = torch.optim.Muon(
        matrices, lr=plan.muon_rate, momentum=0.95, weight_decay=plan.weight_decay, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(rest, lr=plan.adam_rate, betas=(0.9, 0.95), weight_decay=0.0)
    return [_peaked(muon), _peaked(adam)]


def _peaked(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    return optimizer


def rate_at(spent: float, warmup: float) -> float:
    """Share of the peak rate after a share `spent` of the budget: a short rise, then half a cosine down to zero."""
    if spent < warmup:
        return (spent + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (spent - warmup) / (1.0 - warmup))))


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss of a batch (batch, context), float32; the matrix products run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids[:, :-1]).last_hidden_state  # (batch, context - 1, hidden)
        logits = model.lm_head(hidden)  # (batch, context - 1, vocabulary)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def split_loss(model: LlamaForCausalLM, stream: Tensor, windows: int) -> float:
    """Mean next-token loss over `windows` windows spread evenly over a stream, nats per token."""
    starts = torch.linspace(0, len(stream) - CONTEXT, windows).long().tolist()
    rows = torch.stack([stream[start : start + CONTEXT] for start in starts])  # (windows, context)
    return math.fsum(float(loss_of(model, part)) * len(part) for part in rows.split(16)) / windows


def save(model: LlamaForCausalLM, average: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the averaged weights in bfloat16, config and tokenizer; the folder appears whole or not at all."""
    twin = build_model(tokenizer.bos_token_id)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(average[name])
    twin.config.use_cache = twin.generation_config.use_cache = True
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    twin.to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    _name_tokenizer_class(draft / "tokenizer_config.json")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _name_tokenizer_class(path: Path) -> None:
    # Transformers 5 writes a name that tools built on version 4 do not know; both know this one.
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def train(plan: Plan) -> dict[str, Any]:
    """Run the plan, write the model to `plan.folder`, and return the measured facts of the run."""
    torch.manual_seed(plan.seed)
    tokenizer, streams = prepare()
    model = build_model(tokenizer.bos_token_id)
    if plan.start is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(plan.start, dtype=torch.float32).state_dict())
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steppers = optimizers(plan, model)
    partial = plan.folder.with_name(plan.folder.name + ".partial")
    started = saved = time.monotonic()
    step, recent = 0, float("nan")
    for ids in batches(plan, streams["library"], streams["tests"], tokenizer.bos_token_id):
        spent = (time.monotonic() - started) / (60.0 * plan.minutes)
        if spent >= 1.0:
            break
        for group in (group for stepper in steppers for group in stepper.param_groups):
            group["lr"] = group["peak"] * rate_at(spent, plan.warmup)
        loss = loss_of(model, ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad()
        step += 1
        blend(average, model, min(plan.average, step / (step + 10)))
        recent = loss.item() if step == 1 else 0.98 * recent + 0.02 * loss.item()
        if step % 50 == 0:
            seconds = time.monotonic() - started
            speed = step * plan.batch * CONTEXT / seconds
            print(f"step {step}  {spent:.1%}  loss {recent:.3f}  {speed:.0f} tokens/s  {seconds:.0f} s", flush=True)
        if time.monotonic() - saved > plan.save_every_s:
            save(model, average, tokenizer, partial)
            saved = time.monotonic()
    save(model, average, tokenizer, plan.folder)
    facts = describe(plan, step, recent, streams)
    shutil.rmtree(partial, ignore_errors=True)
    return facts


def prepare() -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    """The tokenizer, and the streams of ids it makes of the library, its tests, calibration and evaluation."""
    training = stdlib_text.documents("train")
    library = [document.text for document in training if not is_side_matter(document)]
    tests = [document.text for document in training if is_side_matter(document)]
    tokenizer = train_tokenizer(library)
    streams = {
        "library": token_stream(tokenizer, library),
        "tests": token_stream(tokenizer, tests),
        "calibration": token_stream(tokenizer, [stdlib_text.text("calibration")]),
        "evaluation": token_stream(tokenizer, [stdlib_text.text("evaluation")]),
    }
    print({name: f"{len(stream)} tokens" for name, stream in streams.items()}, flush=True)
    return tokenizer, streams


def is_side_matter(document: Document) -> bool:
    """Tests and lib2to3 and the like: much text, less like the held-out splits, so drawn less often."""
    parts = set(document.module.split("."))
    return bool(parts & {"test", "tests", "lib2to3", "idlelib", "turtledemo"})


@torch.no_grad()
def blend(average: dict[str, Tensor], model: LlamaForCausalLM, keep: float) -> None:
    """One step of the moving average of the weights, in place."""
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1.0 - keep)


def describe(plan: Plan, step: int, recent: float, streams: dict[str, Tensor]) -> dict[str, Any]:
    """Reload what was written and measure it on every split."""
    model = LlamaForCausalLM.from_pretrained(plan.folder, dtype=torch.float32).eval()
    measured = {name: stream for name, stream in streams.items() if len(stream) >= CONTEXT}
    losses = {name: split_loss(model, stream, 200) for name, stream in measured.items()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minutes": plan.minutes,
        "steps": step,
        "tokens_seen": step * plan.batch * CONTEXT,
        "last_training_loss": round(recent, 4),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "stream_tokens": {name: len(stream) for name, stream in streams.items()},
        "loss": {name: round(loss, 4) for name, loss in losses.items()},
        "perplexity": {name: round(math.exp(loss), 3) for name, loss in losses.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=Plan.minutes, help="wall time of the training")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint, with AdamW alone")
    options = parser.parse_args()
    plan = Plan(options.output, options.minutes, options.seed)
    if options.start is not None:  # many small steps at a high rate: the channels have to find new scales
        plan = replace(plan, start=options.start, batch=8, adam_rate=3e-3, average=0.99)
    facts = train(plan)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
