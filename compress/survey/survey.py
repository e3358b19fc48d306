"""The first pass over the dense model, where a method needs one: curves of loss, output gradients, angles of the blocks.

Without an allocator, gradients or a choice of blocks there is no first pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from paredown.compress.allocation.budget import (
    DATA_DRIVEN,
    AllocationSpec,
    Curve,
    Ranks,
    by_global_loss,
    by_sensitivity,
    by_share,
    by_theoretical_loss,
)
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import spread
from paredown.compress.machine import return_freed_memory
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.model.blocks import Block, View, blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, NEEDS, InputStats
from paredown.compress.survey.gradients import Labels, backward
from paredown.compress.survey.observe import Observer
from paredown.compress.survey.sensitivity import Probe, Sensitivities

Note = Callable[[str], None]


@dataclass
class Survey:
    """What the first pass found, and what it leads to."""

    scratch: Path
    curves: dict[str, Curve] = field(default_factory=dict)
    angles: list[float] = field(default_factory=list)  # per block, in units of pi
    ranks: Ranks | None = None  # None: every layer settles its own rank
    chosen: set[str] = field(default_factory=set)  # layers that are edited
    strategy: str = "uniform"
    sensitivities: Sensitivities = field(default_factory=dict)

    def gradients(self, block: Block, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """Gradient moments of the block's layers, float32, by layer and by name out of GRADIENT_NEEDS."""
        path = self._path(block)
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in (load_file(path) if path.exists() else {}).items():
            layer, _, need = key.rpartition("|")
            found.setdefault(layer, {})[need] = tensor.to(device)
        return found

    def keep_gradients(self, block: Block, stats: dict[str, InputStats], needs: frozenset[str]) -> None:
        """In float32, on disk: a model's moments do not fit into memory."""
        kept = {
            f"{name}|{need}": s.gradient(need).float().cpu().contiguous() for name, s in stats.items() for need in needs
        }
        if kept:
            save_file(kept, self._path(block))

    def predicted(self, name: str, rank: int) -> float | None:
        """Predicted loss at a rank, as a share of what dropping the whole weight would lose; None without a curve."""
        curve = self.curves.get(name)
        return curve.loss(rank) / max(curve.loss(0), 1e-300) if curve and curve.losses else None

    def progress(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What `restored` needs beside the scratch folder, as facts and tensors."""
        facts = {
            "shapes": {name: curve.shape for name, curve in self.curves.items()},
            "sensitivities": {name: list(losses.items()) for name, losses in self.sensitivities.items()},
            "angles": self.angles, "ranks": self.ranks, "chosen": sorted(self.chosen), "strategy": self.strategy,
        }  # fmt: skip
        return facts, {name: torch.tensor(c.losses, dtype=torch.float64) for name, c in self.curves.items()}

    @classmethod
    def restored(cls, scratch: Path, facts: dict[str, Any], losses: dict[str, Tensor]) -> "Survey":
        curves = {n: Curve(n, (out, inner), losses[n].tolist()) for n, (out, inner) in facts["shapes"].items()}
        sensitivities = {name: dict(found) for name, found in facts["sensitivities"].items()}
        return cls(
            scratch, curves, facts["angles"], facts["ranks"], set(facts["chosen"]), facts["strategy"], sensitivities
        )

    def _path(self, block: Block) -> Path:
        return self.scratch / f"gradients-{block.index}.safetensors"


def survey(
    source: ModelSource,
    method: Any,
    allocation: AllocationSpec | None,
    ids: Tensor,
    chosen: set[str],
    scratch: Path,
    note: Note = lambda text: None,
) -> Survey:
    """All that the walk must know beforehand; ids (windows, length) is the calibration text."""
    made = Survey(scratch, chosen=set(chosen))
    spec = spread(method, allocation, chosen)
    gradient = method.needs & GRADIENT_NEEDS
    if not isinstance(method, Factorized):  # a pruning score may read the diagonal Fisher
        if gradient:
            _walk(made, source, method, made.chosen, ids, gradient, note)
        return made
    made.strategy = spec.strategy
    views = [v for block in blocks(source) for v in block.views() if v.name in chosen and v.expert is None]
    if hasattr(method, "chosen_blocks"):
        made.angles = (
            _angles(source, ids, note) if getattr(method, "surveys_angles", False) else [0.0] * len(blocks(source))
        )
        prefixes = tuple(blocks(source)[i].prefix for i in method.chosen_blocks(made.angles))
        views = [v for v in views if v.name.startswith(prefixes)]
        made.chosen = {name for name in chosen if name.startswith(prefixes)}
    made.curves = {v.name: Curve(v.name, v.shape) for v in views}
    if gradient or made.strategy in DATA_DRIVEN:
        _walk(made, source, method, set(made.curves), ids, gradient, note)
    if made.strategy != "uniform" or method.target_parameters:
        made.ranks = _allocated(made, source, method, spec, ids)
    return made


def _walk(
    made: Survey, source: ModelSource, method: Any, wanted: set[str], ids: Tensor, gradient: frozenset[str], note: Note
) -> None:
    """Fill in curves and gradients: backward where gradients are needed, forward otherwise."""
    needs = method.needs & NEEDS
    if "output_gradient" in gradient:  # a solver reads its diagonal too
        gradient = gradient | {"output_gradient_diagonal"}
    labels: Labels = getattr(method, "labels", "data")
    walk = (
        backward(source, ids, wanted, needs, gradient, made.scratch, labels, note)
        if gradient
        else _forward(source, ids, wanted, needs, note)
    )
    probe = Probe(source, ids, len(wanted)) if made.strategy == "sensitivity" else None
    for block, stats in walk:
        made.keep_gradients(block, stats, gradient)
        if probe is not None:
            probe.add(block, stats, method)
        elif made.strategy in DATA_DRIVEN:
            for view in block.views():
                if view.name in stats:
                    losses = _losses(method, view, stats[view.name])
                    made.curves[view.name] = Curve(view.name, view.shape, losses.tolist())
        del stats  # before the next block's are collected
        return_freed_memory()
    if probe is not None:
        made.sensitivities = probe.losses()


def _losses(method: Factorized, view: View, stats: InputStats) -> Tensor:
    try:
        return method.losses(view.weight, stats)
    except PareError as fault:
        raise PareError(f"{view.name}: {fault}") from fault


def _forward(source: ModelSource, ids: Tensor, wanted: set[str], needs: frozenset[str], note: Note) -> Any:
    stream, all_blocks = start(source, ids), blocks(source)
    for block in all_blocks:
        source.materialise(block.prefix, block.names)
        observer = Observer([v for v in block.views() if v.name in wanted], needs, source.device)
        with observer:
            for i, made in enumerate(stream.outputs(block)):
                observer.next_batch()
                stream.hidden[i] = made.to("cpu")
        yield block, observer.stats
        source.release(block.prefix, block.names)
        note(f"survey: block {block.index + 1} of {len(all_blocks)}")


def _angles(source: ModelSource, ids: Tensor, note: Note) -> list[float]:
    """Mean angle, in units of pi, by which each block turns its hidden states. Gromov et al. 2024 (arXiv 2403.17887)."""
    stream, found = start(source, ids), []
    for block in blocks(source):
        source.materialise(block.prefix, block.names)
        before = stream.hidden.copy()
        stream.advance(block)
        turned = [
            torch.cosine_similarity(a.float(), b.float(), dim=-1).clamp(-1, 1).acos().mean()
            for a, b in zip(before, stream.hidden, strict=True)
        ]
        found.append(float(torch.stack(turned).mean()) / math.pi)
        source.release(block.prefix, block.names)
        note(f"survey, angles: block {block.index + 1} of {len(blocks(source))}")
    return found


def _allocated(made: Survey, source: ModelSource, method: Factorized, spec: AllocationSpec, ids: Tensor) -> Ranks:
    curves, total = list(made.curves.values()), sum(c.size for c in made.curves.values())
    kept = method.share or share_of_model(source, method, total)
    if made.strategy == "global":
        return by_global_loss(curves, int(kept * total), method.numbers)
    if made.strategy == "theoretical_loss":
        return by_theoretical_loss(curves, kept, method.largest, method.numbers, ids.numel())
    if made.strategy == "sensitivity":
        return by_sensitivity(curves, made.sensitivities, kept, method.largest, method.numbers)
    return by_share(curves, kept, spec.weights, method.largest, method.numbers)


def share_of_model(source: ModelSource, method: Factorized, targeted: int) -> float:
    """Of the targeted parameters, so that the whole model has `target_parameters`."""
    assert method.target_parameters is not None
    total = sum(t.numel() for t in source.parameters.values())
    kept = (method.target_parameters - (total - targeted)) / targeted
    if not 0 < kept < 1:
        raise PareError(
            f"target_parameters {method.target_parameters:,} cannot be met: the model has {total:,}, of which "
            f"{targeted:,} are targeted. Ask for a number between {total - targeted:,} and {total:,}."
        )
    return kept


def of_layer(made: Survey, method: Any, name: str) -> Any:
    """The method with the rank that the allocation gives a layer; None where it stays dense."""
    if made.ranks is None:
        return method
    rank = made.ranks.get(name)
    return None if rank is None else method.with_rank(rank)
