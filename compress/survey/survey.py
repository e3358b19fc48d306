"""The first pass over the dense model: scores of blocks, predicted losses of choices, output gradients, angles of blocks.

There is none for a job that needs none of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.compress.allocation.base import Sensitivities
from paredown.compress.allocation.by_score import ByScore
from paredown.compress.errors import PareError
from paredown.compress.job import Job
from paredown.compress.machine import return_freed_memory
from paredown.compress.methods.base import Choice
from paredown.compress.model.blocks import Block, View, by_owner
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, InputStats, Need, Stats
from paredown.compress.progress import Counted, ignore
from paredown.compress.survey.direct import Pairs
from paredown.compress.survey.gradients import Pair, backward
from paredown.compress.survey.products import InputObserver
from paredown.compress.survey.sensitivity import SensitivityProbe

TOKENS = 4096  # of the calibration text, for losses predicted from tokens


@dataclass
class Survey:
    """What the first pass measured. Gradients are files in `scratch`: those of a whole model do not fit into memory."""

    scratch: Path
    # with predicted losses, smallest first; by layer, all experts of a fused weight as one
    choices: dict[str, list[Choice]] = field(default_factory=dict)
    angles: list[float] | None = None  # of each block, in units of pi: see `_angles`
    sensitivities: Sensitivities = field(default_factory=dict)  # nats per token, by layer and share
    scores: dict[str, float] = field(default_factory=dict)  # by layer, of an allocation that reads scores

    def gradients(self, block: Block, device: torch.device) -> dict[str, dict[Need, Tensor]]:
        """Moments of output gradients, float32, by layer of the block and by need: shapes as in `gradients.moments`."""
        path = self._path(block)
        by_layer: dict[str, dict[Need, Tensor]] = {}
        for key, tensor in (load_file(path) if path.exists() else {}).items():
            layer, _, need = key.rpartition("|")
            by_layer.setdefault(layer, {})[Need(need)] = tensor.to(device)
        return by_layer

    def keep_gradients(self, block: Block, stats: Mapping[str, Stats], needs: frozenset[Need]) -> None:
        """Write these moments of output gradients to disk, in float32; without the layers that have no gradient."""
        tensors = {
            f"{name}|{need}": s.gradient(need).float().cpu().contiguous()
            for name, s in stats.items()
            for need in needs & s.gradients.keys()
        }
        if tensors:
            save_file(tensors, self._path(block))

    def predicted(self, name: str, option: Any) -> float | None:
        """Predicted loss of a layer's option, as a share of the loss of removing the whole weight; None if not measured."""
        choices = self.choices.get(name)
        choice = next((c for c in choices or () if c.option == option), None)
        return choice.loss / max(choices[0].loss, 1e-300) if choices and choice is not None else None

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All but the gradients, for `restored`: facts that JSON can hold, and tensors."""
        facts = {
            "choices": {name: [[c.numbers, c.option] for c in choices] for name, choices in self.choices.items()},
            "sensitivities": {name: list(losses.items()) for name, losses in self.sensitivities.items()},
            "angles": self.angles,
            "scores": self.scores,
        }
        losses = {name: [c.loss for c in choices] for name, choices in self.choices.items()}
        return facts, {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()}

    @classmethod
    def restored(cls, scratch: Path, facts: Mapping[str, Any], losses: Mapping[str, Tensor]) -> "Survey":
        """The survey whose `state` this is, with its gradients in `scratch`."""
        choices = {
            name: [Choice(n, loss, o) for (n, o), loss in zip(pairs, losses[name].tolist(), strict=True)]
            for name, pairs in facts["choices"].items()
        }
        sensitivities = {name: dict(pairs) for name, pairs in facts["sensitivities"].items()}
        return cls(scratch, choices, facts["angles"], sensitivities, facts["scores"])

    def _path(self, block: Block) -> Path:
        return self.scratch / f"gradients-{block.index}.safetensors"


def survey(job: Job, ids: Tensor, scratch: Path, note: Callable[[str], None] = ignore) -> Survey:
    """Measure what the job needs to know of the dense model before any block is edited.

    ids (windows, length) is the calibration text; `scratch` an empty folder; `note` is told each step. Raises PareError,
    naming the layer, for data that cannot be used.
    """
    result = Survey(scratch)
    if job.method.surveys_angles:
        result.angles = _angles(job, ids, note)
    views = job.targets_within(result.angles)
    if not job.gradients and job.allocation.reads == "shapes":
        return result
    layers = {view.name for view in views}
    pairs = Pairs(ids.numel(), TOKENS) if job.reads_pairs else None
    for block, stats in _observed(job, ids, layers, scratch, note, pairs.add if pairs else None):
        result.keep_gradients(block, stats, job.gradients)
        if pairs:
            stats = {name: replace(s, pairs=pairs.take(name)) for name, s in stats.items()}
        if job.allocation.reads == "losses":
            result.choices |= _choices(job, block, layers, stats, ids.numel())
        elif isinstance(job.allocation, ByScore):
            result.scores |= _scores(job.allocation, block, layers, stats)
        del stats  # free them before the next block's are collected
        return_freed_memory()
    if job.allocation.reads == "sensitivities":
        result.sensitivities = _sensitivities(job, ids, views, result, note)
    return result


def _observed(
    job: Job, ids: Tensor, layers: set[str], scratch: Path, note: Callable[[str], None], pair: Pair | None
) -> Iterator[tuple[Block, dict[str, Stats]]]:
    """Each block, in memory, with the statistics of its layers: from last to first where gradients are needed."""
    inputs, gradients = job.surveyed & INPUT_NEEDS, job.surveyed & GRADIENT_NEEDS
    reads = job.allocation.reads
    if gradients:
        inputs = frozenset() if reads == "sensitivities" else inputs
        stream, labels = start(job.source, ids), job.method.labels
        return backward(job.source, stream, layers, inputs, gradients, scratch, labels, note, pair)
    if reads == "sensitivities":
        return iter(())  # they go through the model by themselves
    if reads == "scores" and not inputs:
        return _weights_alone(job, layers, note)
    return _forward(job, ids, layers, inputs, note)


def _sensitivities(
    job: Job, ids: Tensor, views: Sequence[View], measured: Survey, note: Callable[[str], None]
) -> Sensitivities:
    """The losses of the model with one layer compressed, block by block, with gradients that were `measured` before."""
    probe = SensitivityProbe(job, ids, views)
    for block, stats in _forward(job, ids, {view.name for view in views}, job.surveyed & INPUT_NEEDS, note):
        gradients = measured.gradients(block, job.source.device)
        whole = {name: s.with_gradients(gradients.get(name, {})) for name, s in stats.items()}
        probe.add(block, {name: s for name, s in whole.items() if job.gradients <= s.gradients.keys()})
        del stats, whole
        return_freed_memory()
    return probe.losses()


def _scores(allocation: ByScore, block: Block, layers: set[str], stats: Mapping[str, Stats]) -> dict[str, float]:
    """The score of each layer of the block, those of its whole block or its own; without the layers not reached."""
    owners = by_owner(v for v in block.views() if v.name in layers and v.name in stats)
    together = [owners] if allocation.per == "block" else [{owner: members} for owner, members in owners.items()]
    scores: dict[str, float] = {}
    for group in filter(None, together):
        score = allocation.score([(v.weight, stats[v.name]) for members in group.values() for v in members])
        scores |= dict.fromkeys(group, score)
    return scores


def _choices(
    job: Job, block: Block, layers: set[str], stats: Mapping[str, Stats], tokens: int
) -> dict[str, list[Choice]]:
    """The method's choices for each of these layers of the block, with predicted losses; without those not measured."""
    needed = job.surveyed & GRADIENT_NEEDS
    measured = {name: s for name, s in stats.items() if needed <= s.gradients.keys()}
    choices = {}
    for owner, members in by_owner(v for v in block.views() if v.name in layers).items():
        if any(view.name in measured for view in members):
            try:
                choices[owner] = job.choices_of(members, measured, tokens)
            except PareError as error:
                raise PareError(f"{owner}: {error}") from error
    return choices


def _forward(
    job: Job, ids: Tensor, layers: set[str], needs: frozenset[Need], note: Callable[[str], None]
) -> Iterator[tuple[Block, dict[str, Stats]]]:
    """As `_observed`, from the first block to the last. The pass that collects also gives the next block's input."""
    source, stream = job.source, start(job.source, ids)
    for block in job.blocks:
        with source.loaded(block):
            views = [v for v in block.views() if v.name in layers]
            observer = InputObserver(views, needs, source.device, length=ids.shape[1])
            with observer:
                for _ in stream.advancing(block):
                    observer.next_batch()
            yield block, {name: Stats(inputs) for name, inputs in observer.stats.items()}
        note(Counted.block("survey", block.index, len(job.blocks)))


def _weights_alone(job: Job, layers: set[str], note: Callable[[str], None]) -> Iterator[tuple[Block, dict[str, Stats]]]:
    """As `_forward`, where nothing of any input is needed: no text goes through the model."""
    for block in job.blocks:
        with job.source.loaded(block):
            views = [v for v in block.views() if v.name in layers]
            yield block, {v.name: Stats(InputStats(v.shape[1], frozenset(), job.source.device)) for v in views}
        note(Counted.block("survey", block.index, len(job.blocks)))


def _angles(job: Job, ids: Tensor, note: Callable[[str], None]) -> list[float]:
    """Of each block the mean angle, in units of pi, between a token's hidden state before and after it.

    Gromov et al. 2024 (arXiv 2403.17887).
    """
    source, stream, angles = job.source, start(job.source, ids), []
    for block in job.blocks:
        before = stream.hidden.copy()
        with source.loaded(block):
            stream.advance(block)
        angles.append(_mean_angle(before, stream.hidden))
        note(Counted.block("survey, angles", block.index, len(job.blocks)))
    return angles


def _mean_angle(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    means = [
        torch.cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1, 1).acos().mean()
        for a, b in zip(before, after, strict=True)
    ]
    return float(torch.stack(means).mean()) / math.pi
