"""What a compression or a recovery did to the weights."""

from typing import Annotated, Any, Literal, NotRequired

from typing_extensions import TypedDict  # pydantic wants this one below Python 3.12

from paredown.evaluation.schema.base import Number, about, strict
from paredown.evaluation.schema.scores import Text


@strict
class Parameters(TypedDict):
    """Numbers of parameters."""

    total: int
    """Of the whole model before compression."""
    targeted: int
    """In the layers that were to be compressed, before compression."""
    kept: int
    """In the same layers after compression: nonzero weights, or numbers in the factors."""


@strict
class BytesChange(TypedDict):
    """Bytes of the weights on disk."""

    before: Annotated[int, about("Of the checkpoint that was read.")]
    after: Annotated[int, about("Of the checkpoint that was written.")]


@strict
class Spectrum(TypedDict):
    """The singular values of a weight in its method's metric, at some ranks; largest first."""

    ranks: list[int]
    """Ranks, counted from 1; that of the layer is among them."""
    energy: list[Number]
    """The squared singular value at each, as a share of the sum of all."""


@strict
class Layer(TypedDict):
    """One compressed layer."""

    name: str
    """Of its weight in the model, without `.weight`."""
    method: str
    """Name of the method."""
    kept: Number
    """Share of its numbers that is stored, 0 to 1."""
    relative_error: Number | None
    """Share of the energy of its output on the calibration text that is wrong; null if not measured.

    The right output is the dense weight's, or, of a method that makes up for the errors of earlier layers, one that does."""
    damping: Number | None
    """What was added to the diagonal of the Hessian, as a share of its mean; null for methods without a Hessian."""
    seconds: Number
    """Time it took to compress it."""
    flops_per_token: NotRequired[int]
    """Floating point operations of its product for one token; a mask skips what it removed."""
    sparsity: NotRequired[Number | str]
    """Share of zeros, or a pattern such as `2:4`; of masks."""
    kind: NotRequired[str]
    """How its factors are stored, such as `lowrank` or `pifa`; of factors."""
    rank: NotRequired[int]
    """Rank of its factors; of factors."""
    measured_loss: NotRequired[Number | None]
    """Loss of what was stored in the method's own metric, as a share of the loss of dropping the weight; of factors."""
    predicted_loss: NotRequired[Number | None]
    """The same as predicted from the dense model, where that loss decided on the ranks; of factors."""
    spectrum: NotRequired[Spectrum]
    """What was cut at its rank; of factors, but for experts."""


@strict
class Structure(TypedDict):
    """What was removed whole."""

    blocks: list[int]
    """The blocks that stay, by their numbers in the model that was read."""
    blocks_before: int
    """How many blocks that model has."""
    units: dict[str, list[int]]
    """Units of a group, such as the channels of an MLP, before and after, by their key of config.json."""
    sizes: NotRequired[dict[str, list[int]]]
    """The same by the name of the module that holds them, where blocks differ."""
    absent: NotRequired[list[str]]
    """Parts of blocks that are absent, such as the attention of one."""
    merged: NotRequired[list[list[int]]]
    """Blocks that became one, by their numbers in the model that was read; the first of them stays."""


@strict
class PartBytes(BytesChange):
    """Bytes of the weights on disk of all layers of a kind."""

    part: str
    """The kind, such as `mlp.down_proj`: the end of a layer's name without numbers."""


@strict
class Reconstruction(TypedDict):
    """How a block was tuned towards the dense block's output."""

    block: str
    """Name of the block."""
    before: Number
    """Mean square error of its output on the calibration text before the tuning, over the variance of the dense one."""
    after: Number
    """The same afterwards."""


@strict
class RecoveryText(Text):
    """A text that a compressed model was trained on, or that told when to stop."""

    corpus: str
    """Its name; of several texts all of them."""
    sequences: int
    """How many windows of it there are."""
    tokens: int
    """In all of them."""


@strict
class ChosenCluster(TypedDict):
    """Windows that are about the same."""

    windows: int
    """How many there are."""
    chosen: int
    """How many of them were trained on."""
    divergence: Number
    """The mean of theirs before training, in nats per token."""


@strict
class Choice(TypedDict):
    """Windows that were chosen by how far the compressed model's probabilities are from the dense one's."""

    candidates: int
    """How many there were."""
    rows: int
    """How many were chosen."""
    clusters: list[ChosenCluster]
    """What they are about."""
    divergence: Number
    """The mean of all of them before training, in nats per token."""
    chosen_divergence: Number
    """The mean of those that were chosen."""


@strict
class RecoveryStep(TypedDict):
    """One step of the training of a compressed model."""

    step: Literal["reconstruct", "distill", "lora"]
    """What was done."""
    recipe: dict[str, Any]
    """The recipe of the recovery, with every default."""
    settings: dict[str, Any]
    """Those of this step."""
    teacher: str
    """Folder or Hub name of the model whose probabilities were the targets."""
    text: NotRequired[RecoveryText]
    """What was trained on, or chosen from."""
    heldout: NotRequired[RecoveryText | None]
    """What told when to stop; null: nothing did."""
    choice: NotRequired[Choice]
    """Of the windows of `text`, which were trained on; left out: all of them."""
    trained: int
    """How many numbers were trained."""
    steps: int
    """Steps of the optimizer."""
    tokens: int
    """Training tokens that were seen, those several times that were."""
    passes: Number
    """How often the training text was seen."""
    curve: list[list[Number]]
    """Tokens seen and the held-out divergence from the teacher then, in nats per token."""
    before: Number
    """The held-out divergence before training; of `reconstruct` the mean of the blocks' errors."""
    after: Number
    """The lowest, of the weights that were kept."""
    best_tokens: int
    """Tokens seen by then."""
    stopped: str
    """Why training ended."""
    seconds: Number
    """Time that it took."""
    target_bytes: int
    """Of the teacher's probabilities on the disk, while it ran."""
    remarks: list[str]
    """What went otherwise than planned: a sentence each."""
    blocks: NotRequired[list[Reconstruction]]
    """Of `reconstruct`: each block."""


@strict
class MergedPart(TypedDict):
    """What became of an adapter's updates of all layers of a kind."""

    part: str
    """The kind, such as `mlp.down_proj`: the end of a layer's name without numbers."""
    kind: str
    """How these layers are stored, such as `sparse24` or `dense`."""
    layers: int
    """How many there are."""
    lost: Number
    """Norm of what mask or rank left out of the updates, relative to the norm of these."""
    written: Number
    """The same with the rounding to the dtype of the weights."""


@strict
class AdapterMerge(TypedDict):
    """An adapter that was merged into the checkpoint."""

    adapter: str
    """Its folder."""
    sha256: str
    """Of the file of its matrices."""
    base: str
    """The model that it names as its own; empty where it names none."""
    parts: list[MergedPart]
    """By kind of layer."""
