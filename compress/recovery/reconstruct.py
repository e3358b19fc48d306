"""Block reconstruction: train an edited block so that its output comes near the dense block's.

It needs no labels and only one block in memory. Adam trains float32 copies of the numbers that the edits store (factors,
weights that a mask keeps) and of the block's vectors (norms, biases); products are in the block's own dtype, as bfloat16.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import Block
from paredown.compress.model.stream import BATCH_TOKENS, Stream, element_size
from paredown.compress.numerics.edits import WeightEdit
from paredown.compress.progress import ignore
from paredown.compress.recipe import ReconstructSpec

EVALUATIONS, PATIENCE = 10, 3  # on held-out windows: how many, and how many without a lower error end training
SHORTER = 0.2  # times the rate, where training ended above its start


@dataclass(frozen=True)
class Reconstructed:
    """Mean square error of the block's output over the variance of the dense one, on the calibration windows."""

    before: float  # training
    after: float
    steps: int = 0  # that were taken


@dataclass(frozen=True)
class Chosen:
    """What of a block is trained, by parameter name within it; False in a mask: there it stays zero."""

    parameters: Mapping[str, nn.Parameter]
    masks: Mapping[str, Tensor]


@torch.no_grad()
def reconstruct(
    block: Block,
    inputs: Stream,
    dense: list[Tensor],
    targets: list[Tensor],
    edits: Mapping[str, WeightEdit | None],
    spec: ReconstructSpec,
    seed: int,
    progress: Callable[[int], None] = ignore,
) -> Reconstructed:
    """`tuned` for a block that was edited now: what the edits store, and its vectors.

    `edits` are by full layer name; None: the whole weight is trained.
    """
    masks = _masks(block, edits)
    trained = {
        name: p for name, p in block.module.named_parameters() if name in masks or _is_trained(name, p, block, edits)
    }
    return tuned(block, inputs, dense, targets, Chosen(trained, masks), spec, seed, progress)


@torch.no_grad()
def tuned(
    block: Block,
    inputs: Stream,
    dense: list[Tensor],
    targets: list[Tensor],
    chosen: Chosen,
    spec: ReconstructSpec,
    seed: int,
    progress: Callable[[int], None] = ignore,
) -> Reconstructed:
    """Train what is `chosen` of the block, by `spec`, with random draws from `seed`, in place.

    `inputs` are the compressed model's hidden states before the block; `dense` and `targets` are the dense block's
    inputs and outputs (batch, length, hidden), in the same batches. `progress` is called with the number of each step. Each
    takes every window's input from `interpolated`, because calibration text is short and the block would otherwise fit it
    too closely. With `spec.heldout` the last windows are not trained on: what has the lowest error on them is kept, and
    training ends once it no longer falls. If the error is no lower afterwards, it begins anew with shorter steps, once; if
    that does not help, the parameters are put back. Raises PareError if the training diverges.
    """
    variance = _variance(targets)
    before = _error(block, inputs, targets) / variance
    original = {name: p.detach().clone() for name, p in chosen.parameters.items()}
    for lr in (spec.lr, SHORTER * spec.lr):
        taken = _trained(block, inputs, dense, targets, chosen, spec, lr, seed, variance, progress)
        after = _error(block, inputs, targets) / variance
        if after < before:
            return Reconstructed(before, after, taken)
        for name, parameter in chosen.parameters.items():
            parameter.copy_(original[name])
    if not after < float("inf"):
        raise PareError(f"{block.name}: reconstruction diverged. Lower reconstruct.lr.")
    return Reconstructed(before, before, taken)


def _trained(
    block: Block,
    inputs: Stream,
    dense: list[Tensor],
    targets: list[Tensor],
    chosen: Chosen,
    spec: ReconstructSpec,
    lr: float,
    seed: int,
    variance: float,
    progress: Callable[[int], None],
) -> int:
    """Leave in the block what `tuned` keeps. Returns how many steps were taken."""
    trained, masks = chosen.parameters, chosen.masks
    masters = {name: p.detach().float().requires_grad_() for name, p in trained.items()}
    # learning rates are relative to each tensor's size: PIFA's coefficients are about ten times as large as its rows
    sizes = [max(float(m.detach().square().mean().sqrt()), 1e-3) for m in masters.values()]
    groups = [{"params": [m], "size": s} for m, s in zip(masters.values(), sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, fused=True)
    generator = torch.Generator().manual_seed(seed)
    seen = len(targets) - _held_out(targets, spec.heldout)  # batches that are trained on
    watch = _Watch(masters, _error(block, inputs, targets, seen)) if seen < len(targets) else None
    taken = 0
    for step in range(spec.steps):
        progress(step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["size"] * (1 - step / spec.steps)
        picked = torch.randperm(seen, generator=generator)[: ceil(spec.batch / len(targets[0]))].tolist()
        for i in picked:
            with torch.enable_grad():
                parameters = {n: (m * masks[n] if n in masks else m).to(trained[n].dtype) for n, m in masters.items()}
                hidden = interpolated(inputs.hidden[i], dense[i], generator).to(inputs.device)
                output = inputs.call(block, i, hidden, parameters)
                target = targets[i].to(inputs.device).float()
                ((output.float() - target).square().mean() / variance / len(picked)).backward()
        optimizer.step()
        optimizer.zero_grad()
        taken = step + 1
        if watch and (taken % ceil(spec.steps / EVALUATIONS) == 0 or taken == spec.steps):
            _show(trained, masters, masks)
            if watch.ends(masters, _error(block, inputs, targets, seen)):
                break
    _show(trained, watch.kept if watch else masters, masks)
    return taken


@dataclass
class _Watch:
    """What had the lowest error on held-out windows, by the name of each parameter."""

    start: Mapping[str, Tensor]
    lowest: float
    kept: dict[str, Tensor] = field(init=False)
    since: int = 0  # evaluations

    def __post_init__(self) -> None:
        self._keep(self.start)

    def ends(self, masters: Mapping[str, Tensor], error: float) -> bool:
        """Keep the numbers if their error is the lowest; whether it has not been for long."""
        self.since = 0 if error < self.lowest else self.since + 1
        if not self.since:
            self.lowest = error
            self._keep(masters)
        return self.since >= PATIENCE

    def _keep(self, masters: Mapping[str, Tensor]) -> None:
        self.kept = {name: master.detach().clone() for name, master in masters.items()}


def _held_out(targets: list[Tensor], windows: int) -> int:
    """How many batches hold so many windows: at least one stays to be trained on. Raises PareError if there is but one."""
    if windows and len(targets) == 1:
        raise PareError(
            "all calibration windows are one batch, of which none can be held out: raise calibration.sequences."
        )
    return min(ceil(windows / len(targets[0])), len(targets) - 1)


def _show(trained: Mapping[str, nn.Parameter], masters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Let the block have the masters' numbers."""
    for name, parameter in trained.items():
        result = masters[name].detach()
        parameter.copy_(result * masks[name] if name in masks else result)


def interpolated(compressed: Tensor, dense: Tensor, generator: torch.Generator) -> Tensor:
    """A random point, for each window, on the line through its two inputs (batch, length, hidden), in the first's dtype.

    compressed + share * (dense - compressed), with one share for each window, uniform in [-0.5, 1.5).
    """
    share = 2 * torch.rand(len(compressed), *[1] * (compressed.dim() - 1), generator=generator) - 0.5
    return torch.lerp(compressed.float(), dense.float(), share).to(compressed.dtype)


def _is_trained(name: str, parameter: nn.Parameter, block: Block, edits: Mapping[str, WeightEdit | None]) -> bool:
    """Vectors, and whatever an edit stores."""
    layer = block.prefix + name.rpartition(".")[0]
    if block.prefix + name in block.shared:  # what one block learns would be lost for the others
        return False
    return parameter.is_floating_point() and (parameter.dim() == 1 or layer in edits)


def _masks(block: Block, edits: Mapping[str, WeightEdit | None]) -> dict[str, Tensor]:
    """The mask (bool) of each masked parameter, in the layout of its module; by parameter name within the block."""
    masks: dict[str, Tensor] = {}
    for view in block.views():
        edit = edits.get(view.name)
        if edit is None or edit.keep is None:
            continue
        name = view.stored_name.removeprefix(block.prefix)
        # True for the experts that were not edited
        mask = masks.setdefault(name, torch.ones_like(view.tensor, dtype=torch.bool))
        view.part_of(mask).copy_(edit.keep)
    return masks


def _error(block: Block, inputs: Stream, targets: list[Tensor], first: int = 0) -> float:
    """Mean square difference of the block's output from the targets, of the batches from `first` on."""
    total = count = 0.0
    outputs = (inputs.output(block, i) for i in range(first, len(targets))) if first else inputs.outputs(block)
    for output, target in zip(outputs, targets[first:], strict=True):
        difference = output.float() - target.to(output.device).float()
        total += float(difference.square().sum(dtype=torch.float64))
        count += target.numel()
    return total / count


def _variance(targets: list[Tensor]) -> float:
    """Variance of all numbers of the targets, as one set."""
    count = sum(t.numel() for t in targets)
    mean = sum(float(t.sum(dtype=torch.float64)) for t in targets) / count
    return max(sum(float((t.float() - mean).square().sum(dtype=torch.float64)) for t in targets) / count, 1e-30)


def tuning_bytes(source: ModelSource, numbers: int, width: int) -> int:
    """Bytes that training so many numbers of a block takes.

    Float32 copies, their gradients, masked copies and Adam's two moments; the tensors in use and the original ones; and
    the `width` numbers a token of a batch that autograd keeps.
    """
    element = element_size(source)
    return (20 + 2 * element) * numbers + element * BATCH_TOKENS[source.device.type] * width
