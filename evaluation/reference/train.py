"""Train the bundled reference model: a small Llama and its byte-level BPE, on the training side of the corpus stdlib.

    python -m paredown.evaluation.reference.train -o FIRST --minutes 46
    python -m paredown.evaluation.reference.train -o FOLDER --minutes 24 --start FIRST

The first run uses Muon (Jordan et al., 2024) for the matrices, and AdamW for the embedding and the norms. The budget is wall
time, and the learning rate depends on the share of it that is spent: a faster machine sees more tokens on the same schedule.
The weights that are written are a moving average over the last steps, in bfloat16.

`--start` continues an earlier run with AdamW for all weights, as most published models were trained. After Muon alone,
Wanda at 2:4 did worse than magnitude pruning; after AdamW it did better. The README beside this file has the numbers.
"""

import argparse
import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from paredown.compress.text import stdlib_text
from paredown.compress.text.stdlib_text import Document

END_OF_TEXT = "<|endoftext|>"

Documents = Callable[[str], list[Document]]  # of a split: train, calibration or evaluation
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Plan:
    """The settings of one run."""

    folder: Path  # to write the model to
    minutes: float = 55.0  # wall time of the steps
    seed: int = 0
    batch: int = 16  # windows in a step
    muon_rate: float = 0.02  # peak learning rate
    adam_rate: float = 2e-3  # peak learning rate
    weight_decay: float = 0.02
    warmup: float = 0.02  # share of the time in which the learning rate rises
    average: float = 0.995  # decay of the moving average of the weights, for each step
    tests: float = 0.3  # share of the windows that is drawn from tests
    save_every_s: float = 240.0  # seconds
    start: Path | None = None  # continue from this checkpoint, with AdamW alone
    vocabulary: int = 4096  # tokens
    context: int = 512  # tokens of a window


def train_tokenizer(plan: Plan, texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE that decodes to exactly the same string, and adds no special tokens by itself."""
    bpe = Tokenizer(models.BPE())
    # each digit is a token; runs of blanks may be one, because source code is indented
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=plan.vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=plan.context,
        clean_up_tokenization_spaces=False,
    )


def build_model(plan: Plan, end_of_text: int) -> LlamaForCausalLM:
    """The untrained model: 6.9 million parameters, grouped-query attention, tied embeddings, float32."""
    config = LlamaConfig(
        vocab_size=plan.vocabulary,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=plan.context,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        use_cache=False,
    )
    return LlamaForCausalLM(config).float()


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """The ids of all documents in one row, with the end-of-text token before each document: (tokens,) int64."""
    opening = tokenizer.bos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.tensor([token for one in encoded for token in (opening, *one.ids)], dtype=torch.int64)


def batches(plan: Plan, library: Tensor, tests: Tensor, opening: int) -> Iterator[Tensor]:
    """Windows at random offsets, (batch, context) int64: a share `plan.tests` from `tests`, the others from `library`.

    In half of the windows the first token becomes `opening`, the end-of-text token: the model learns both to begin a text
    and to continue one.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    reach = torch.arange(plan.context)  # (context,)
    while True:
        from_tests = torch.rand(plan.batch, generator=generator) < (plan.tests if len(tests) > plan.context else 0.0)
        place = torch.rand(plan.batch, generator=generator)  # (batch,)
        rows = []
        for use_tests, share in zip(from_tests.tolist(), place.tolist(), strict=True):
            stream = tests if use_tests else library
            rows.append(stream[int(share * (len(stream) - plan.context)) + reach])
        window = torch.stack(rows)  # (batch, context)
        window[torch.rand(plan.batch, generator=generator) < 0.5, 0] = opening
        yield window


def optimizers(plan: Plan, model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices in the blocks, and AdamW for the tied embedding and the norms; with `plan.start` AdamW for all.

    Each parameter group holds its peak learning rate as `peak`.
    """
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
    """Learning rate as a share of its peak, after a share `spent` of the time: a linear rise, then half a cosine to zero."""
    if spent < warmup:
        return (spent + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (spent - warmup) / (1.0 - warmup))))


def loss_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Mean next-token loss in nats of ids (batch, context), float32 (); matrix products run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids[:, :-1]).last_hidden_state  # (batch, context - 1, hidden)
        logits = model.lm_head(hidden)  # (batch, context - 1, vocabulary)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def split_loss(model: LlamaForCausalLM, stream: Tensor, windows: int) -> float:
    """Mean next-token loss in nats over `windows` windows that are spread evenly over a stream (tokens,)."""
    context = model.config.max_position_embeddings
    starts = torch.linspace(0, len(stream) - context, windows).long().tolist()
    rows = torch.stack([stream[start : start + context] for start in starts])  # (windows, context)
    return math.fsum(float(loss_of(model, part)) * len(part) for part in rows.split(16)) / windows


def save(model: LlamaForCausalLM, average: dict[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the averaged weights in bfloat16, config and tokenizer; the folder appears complete or not at all."""
    averaged = LlamaForCausalLM(deepcopy(model.config))
    with torch.no_grad():
        for name, parameter in averaged.named_parameters():
            parameter.copy_(average[name])
    averaged.config.use_cache = averaged.generation_config.use_cache = True
    draft = folder.with_name(folder.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    averaged.to(torch.bfloat16).save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    _name_tokenizer_class(draft / "tokenizer_config.json")
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _name_tokenizer_class(path: Path) -> None:
    # transformers 5 writes a class name that version 4 does not know; both know this one
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def train(plan: Plan, documents: Documents = stdlib_text.documents, clock: Clock = time.monotonic) -> dict[str, Any]:
    """Train a model as planned on the `train` split, write it to `plan.folder`, and return measured facts of the run.

    `documents(split)` is the text; `clock` counts seconds.
    """
    torch.manual_seed(plan.seed)
    tokenizer, streams = prepare(plan, documents)
    model = build_model(plan, tokenizer.bos_token_id)
    if plan.start is not None:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(plan.start, dtype=torch.float32).state_dict())
    average = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    steppers = optimizers(plan, model)
    partial = plan.folder.with_name(plan.folder.name + ".partial")
    started = saved = clock()
    step, recent = 0, float("nan")
    for ids in batches(plan, streams["library"], streams["tests"], tokenizer.bos_token_id):
        spent = (clock() - started) / (60.0 * plan.minutes)
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
            seconds = clock() - started
            speed = step * plan.batch * plan.context / seconds
            print(f"step {step}  {spent:.1%}  loss {recent:.3f}  {speed:.0f} tokens/s  {seconds:.0f} s", flush=True)
        if clock() - saved > plan.save_every_s:
            save(model, average, tokenizer, partial)
            saved = clock()
    save(model, average, tokenizer, plan.folder)
    facts = describe(plan, step, recent, streams)
    shutil.rmtree(partial, ignore_errors=True)
    return facts


def prepare(
    plan: Plan, documents: Documents = stdlib_text.documents
) -> tuple[PreTrainedTokenizerFast, dict[str, Tensor]]:
    """The tokenizer, trained on the library, and the ids (tokens,) of library, tests, calibration and evaluation split."""
    training = documents("train")
    library = [document.text for document in training if not is_side_matter(document)]
    tests = [document.text for document in training if is_side_matter(document)]
    tokenizer = train_tokenizer(plan, library)
    held_out = {
        split: [stdlib_text.JOINER.join(document.text for document in documents(split))]
        for split in ("calibration", "evaluation")
    }
    texts = {"library": library, "tests": tests, **held_out}
    streams = {name: token_stream(tokenizer, parts) for name, parts in texts.items()}
    print({name: f"{len(stream)} tokens" for name, stream in streams.items()}, flush=True)
    return tokenizer, streams


def is_side_matter(document: Document) -> bool:
    """Tests, lib2to3 and the like: much text that is less like the held-out splits, so it is drawn less often."""
    parts = set(document.module.split("."))
    return bool(parts & {"test", "tests", "lib2to3", "idlelib", "turtledemo"})


@torch.no_grad()
def blend(average: dict[str, Tensor], model: LlamaForCausalLM, keep: float) -> None:
    """Update the moving average of the weights in place: `keep` of the average, the rest from the model."""
    for name, parameter in model.named_parameters():
        average[name].lerp_(parameter, 1.0 - keep)


def describe(plan: Plan, step: int, recent: float, streams: dict[str, Tensor]) -> dict[str, Any]:
    """Facts of the run, with the loss of the written model, loaded again, on every stream of ids."""
    model = LlamaForCausalLM.from_pretrained(plan.folder, dtype=torch.float32).eval()
    measured = {name: stream for name, stream in streams.items() if len(stream) >= plan.context}
    losses = {name: split_loss(model, stream, 200) for name, stream in measured.items()}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "minutes": plan.minutes,
        "steps": step,
        "tokens_seen": step * plan.batch * plan.context,
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
    parser.add_argument("--start", type=Path, help="continue from this checkpoint, with AdamW alone")
    options = parser.parse_args()
    plan = Plan(options.output, options.minutes, options.seed)
    if options.start is not None:  # many small steps at a high rate, so that the scales of the channels change
        plan = replace(plan, start=options.start, batch=8, adam_rate=3e-3, average=0.99)
    facts = train(plan)
    print(json.dumps(facts, indent=2))


if __name__ == "__main__":
    main()
