"""Tune what an edited block may still change so that it gives the dense block's output from the compressed block's input.

No labels, and nothing beyond the block: float32 masters of its free parameters with Adam's two moments. Free are the
numbers that edits store (factors, surviving weights under their masks) and the block's vectors (norms, biases).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block
from paredown.compress.model.stream import Stream
from paredown.compress.numerics.edits import Edit, Masked
from paredown.compress.recipe import ReconstructSpec


@dataclass(frozen=True)
class Reconstructed:
    """Mean square error over the variance of the dense output, before and after, on the calibration windows."""

    before: float
    after: float


@torch.no_grad()
def reconstruct(
    block: Block,
    inputs: Stream,
    dense: list[Tensor],
    targets: list[Tensor],
    edits: Mapping[str, Edit],
    spec: ReconstructSpec,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> Reconstructed:
    """Tune the block in place. `dense` and `targets` are the dense block's inputs and outputs, by batch as in `inputs`.

    Each step draws every window's input on the line through the compressed block's and the dense one's: calibration text
    is short, and tuned on its inputs alone the block fits them more than what comes later.
    The tuned parameters are kept only where they lower the error. Raises PareError if the tuning diverges.
    """
    masks = _masks(block, edits)
    free = {name: p for name, p in block.module.named_parameters() if name in masks or _is_free(name, p, block, edits)}
    variance = _variance(targets)
    before = _error(block, inputs, targets) / variance
    saved = {name: p.detach().clone() for name, p in free.items()}
    masters = {name: p.detach().float().requires_grad_() for name, p in free.items()}
    # relative to each tensor's size: PIFA's coefficients are some ten times as large as its rows
    sizes = [max(float(m.detach().square().mean().sqrt()), 1e-3) for m in masters.values()]
    optimizer = torch.optim.Adam([{"params": [m], "size": s} for m, s in zip(masters.values(), sizes, strict=True)])
    draw = torch.Generator().manual_seed(seed)
    for step in range(spec.steps):
        progress(step + 1)
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * group["size"] * (1 - step / spec.steps)
        picked = torch.randperm(len(targets), generator=draw)[: ceil(spec.batch / len(targets[0]))].tolist()
        for i in picked:
            with torch.enable_grad():
                live = {n: (m * masks[n] if n in masks else m).to(free[n].dtype) for n, m in masters.items()}
                made = inputs.call(block, _drawn(inputs.hidden[i], dense[i], draw).to(inputs.device), live)
                target = targets[i].to(inputs.device).float()
                ((made.float() - target).square().mean() / variance / len(picked)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in free.items():
        tuned = masters[name].detach()
        parameter.copy_(tuned * masks[name] if name in masks else tuned)
    after = _error(block, inputs, targets) / variance
    if not after < float("inf"):
        raise PareError(f"{block.prefix.rstrip('.')}: reconstruction diverged. Lower reconstruct.lr.")
    if after > before:
        for name, parameter in free.items():
            parameter.copy_(saved[name])
        after = before
    return Reconstructed(before, after)


def _drawn(compressed: Tensor, dense: Tensor, draw: torch.Generator) -> Tensor:  # (batch, length, hidden)
    """From half the way beyond the compressed input to half the way beyond the dense one."""
    share = 2 * torch.rand(len(compressed), 1, 1, generator=draw) - 0.5
    return torch.lerp(compressed.float(), dense.float(), share).to(compressed.dtype)


def _is_free(name: str, parameter: nn.Parameter, block: Block, edits: Mapping[str, Edit]) -> bool:
    layer = block.prefix + name.rpartition(".")[0]
    return parameter.is_floating_point() and (parameter.dim() == 1 or layer in edits)


def _masks(block: Block, edits: Mapping[str, Edit]) -> dict[str, Tensor]:
    """What each masked parameter keeps, as the module holds it; by parameter name within the block."""
    found: dict[str, Tensor] = {}
    for view in block.views():
        edit = edits.get(view.name)
        if not isinstance(edit, Masked):
            continue
        name = f"{view.owner.removeprefix(block.prefix)}" + (".weight" if view.expert is None else "")
        keep = edit.keep.T if view.layout == "conv1d" else edit.keep
        if view.expert is None:
            found[name] = keep
        else:  # experts that were not edited keep everything
            whole = getattr(view.module, view.parameter)
            found.setdefault(name, torch.ones_like(whole, dtype=torch.bool))[view.expert] = keep
    return found


def _error(block: Block, inputs: Stream, targets: list[Tensor]) -> float:
    """Mean square difference of the block's output from the targets."""
    total = count = 0.0
    for made, target in zip(inputs.outputs(block), targets, strict=True):
        difference = made.float() - target.to(made.device).float()
        total += float(difference.square().sum(dtype=torch.float64))
        count += target.numel()
    return total / count


def _variance(targets: list[Tensor]) -> float:
    """Of the targets about their mean."""
    count = sum(t.numel() for t in targets)
    mean = sum(float(t.sum(dtype=torch.float64)) for t in targets) / count
    return max(sum(float((t.float() - mean).square().sum(dtype=torch.float64)) for t in targets) / count, 1e-30)
