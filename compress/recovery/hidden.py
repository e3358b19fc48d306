"""How far a student's hidden states h_s are from a teacher's h_t, of tokens i and channels c:

    mean_ic (h_s - h_t)^2_ic / (r_i^2 e_c),   r_i^2 = mean_c (h_t)^2_ic,   e_c = mean_i (h_t)^2_ic / r_i^2.

The intermediate loss of Minitron (Muralidharan et al. 2024, arXiv 2407.14679), relative to each token and channel: a plain
mean belongs to a few first tokens and channels whose states are hundreds of times as large as all others (Sun et al. 2024,
Massive Activations, arXiv 2402.17762). The teacher's states are kept divided by r, so that float16 holds any of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paredown.compress.recipe import HiddenSpec

LEAST_SIZE = 1e-6  # root mean square of a token whose state is zeros
LEAST_ENERGY = 1e-3  # of a channel: a tenth of a percent of the mean, which is 1


@dataclass(frozen=True)
class States:
    """Of some layers: states of unit size (windows, layers, length, hidden) and their sizes (windows, layers, length)."""

    values: Tensor  # float16
    sizes: Tensor  # float32

    @classmethod
    def stacked(cls, layers: "Sequence[States]") -> "States":
        """Of several layers, from those of each; of none: empty."""
        if not layers:
            return cls(torch.empty(0), torch.empty(0))
        return cls(torch.stack([s.values for s in layers], 1), torch.stack([s.sizes for s in layers], 1))


def layers_of(spec: HiddenSpec | None, blocks: int) -> tuple[int, ...]:
    """The blocks whose outputs are compared, by index: the last of them, and each `every`-th."""
    if spec is None:
        return ()
    return tuple(i for i in range(blocks) if i == blocks - 1 or (spec.every and (i + 1) % spec.every == 0))


def scaled(hidden: Tensor) -> States:
    """Hidden states (..., hidden) divided by the root mean square of each token."""
    wide = hidden.float()
    sizes = wide.square().mean(-1).sqrt().clamp(min=LEAST_SIZE)  # (...)
    return States((wide / sizes[..., None]).half(), sizes)


def states_error(student: Sequence[Tensor], teacher: States) -> Tensor:
    """The error of each layer's states (windows, length, hidden), the mean over the layers, float32."""
    total = torch.zeros((), device=student[0].device)
    for layer, hidden in enumerate(student):
        wanted = teacher.values[:, layer].to(hidden.device).float()
        sizes = teacher.sizes[:, layer, :, None].to(hidden.device)
        energy = wanted.square().mean((0, 1)).clamp(min=LEAST_ENERGY)  # (hidden,)
        total = total + ((hidden.float() / sizes - wanted).square() / energy).mean()
    return total / len(student)


@contextmanager
def outputs_of(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside the `with` block the hidden states that each of the modules returns are put into the list, as it is called."""
    found: list[Tensor] = []

    def hear(module: nn.Module, given: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handles = [module.register_forward_hook(hear) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
