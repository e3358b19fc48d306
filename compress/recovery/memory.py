"""Bytes of memory that distillation takes, by count."""

from dataclasses import dataclass

from paredown.compress.recipe import DistillSpec
from paredown.compress.recovery.divergence import POSITIONS
from paredown.compress.recovery.optimizer import MOMENT_BYTES

MASTER_BYTES = 8  # of a trained number: itself and its gradient in float32


@dataclass(frozen=True)
class Sizes:
    """Counts of a model that is trained."""

    stored: int  # bytes of its weights as they are stored
    packed: int  # numbers of its packed weights, zeros too
    trained: int  # numbers that are trained
    blocks: int
    width: int  # of a hidden state
    inner: int  # of the widest layer in a block
    vocabulary: int
    element: int  # bytes of one number in products


def saved_bytes(sizes: Sizes, spec: DistillSpec) -> int:
    """Of a saved state, from which an interrupted run goes on: masters, moments and the best numbers so far."""
    return (4 + MOMENT_BYTES[spec.optimizer] + sizes.element) * sizes.trained


def device_bytes(sizes: Sizes, spec: DistillSpec, tokens: int) -> int:
    """Where the student is trained, on so many tokens a pass.

    The model; of what is trained masters, gradients and moments; logits with their gradients, some of them in float32. What
    a backward pass needs of each block: packed weights unpacked, and activations, which for each token are 8 hidden states
    and 4 of the widest layer, and two hidden states in float32, as in Llama. With checkpointing that is of one block only,
    and of the others what goes in.
    """
    block = sizes.packed // sizes.blocks * sizes.element
    block += tokens * (sizes.element * (8 * sizes.width + 4 * sizes.inner) + 8 * sizes.width)
    inputs = sizes.element * sizes.width * tokens
    inside = block + sizes.blocks * inputs if spec.checkpointing else sizes.blocks * block
    logits = (2 * sizes.element * tokens + 12 * POSITIONS) * sizes.vocabulary
    trained = (MASTER_BYTES + MOMENT_BYTES[spec.optimizer]) * sizes.trained
    return sizes.stored + trained + inside + logits


def host_bytes(sizes: Sizes, spec: DistillSpec) -> int:
    """Beside that in the host's memory: the first numbers, the best so far, and a state while it is saved."""
    return 2 * sizes.element * sizes.trained + saved_bytes(sizes, spec)
