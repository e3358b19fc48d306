"""The steps that win quality back."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from paredown.compress.recipe.spec import Count, Strict


class ReconstructSpec(Strict):
    """Tune each compressed block towards the dense block's output: `steps` of Adam on `batch` windows each.

    `lr` is the first step's size relative to the root mean square of each tensor; it falls linearly to zero. A block that it
    does not help is tuned once more at a fifth of it. `heldout`: so many of the calibration windows are not trained on, and
    tell when to stop; 0: all steps are taken.
    """

    steps: Count = Field(150, ge=1)
    lr: float = Field(5e-3, gt=0, strict=True)
    batch: Count = Field(8, ge=1)
    heldout: Count = Field(0, ge=0)


class HiddenSpec(Strict):
    """Beside the probabilities the last block's output is to be the teacher's too, or that of each `every`-th block besides.

    Their error relative to each token counts `weight` times.
    """

    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    every: Count = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _number(cls, raw: Any) -> Any:
        return {"weight": raw} if isinstance(raw, int | float) and not isinstance(raw, bool) else raw


class TaidSpec(Strict):
    """The target goes from the student's own probabilities to the teacher's, whose share is `start` at first.

    It grows linearly to `end`, and faster while the loss falls: by up to `alpha`; `beta` is the momentum of what it sees.
    """

    start: float = Field(0.4, ge=0, lt=1)
    end: float = Field(1.0, gt=0, le=1)
    alpha: float = Field(5e-4, ge=0, le=1)
    beta: float = Field(0.99, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _by_default(cls, raw: Any) -> Any:
        return {} if raw is True else raw

    @model_validator(mode="after")
    def _upward(self) -> Self:
        if self.start >= self.end:
            raise PydanticCustomError("taid", "start is below end")
        return self


class DataSpec(Strict):
    """Windows to train on, chosen of more: as many that `budget` of them are trained on.

    They are those where student and teacher disagree most, out of every one of the `clusters` of what windows are about.
    """

    choose: Literal["disagreement"]
    budget: float = Field(0.2, gt=0, lt=1)
    clusters: Count = Field(8, ge=1)


class DistillSpec(Strict):
    """Train what a compressed checkpoint stores towards the dense model's next-token probabilities.

    `lr` is the largest step's size relative to the root mean square of each tensor: it rises during the share `warmup` of
    the steps, and falls along a cosine. Windows have `length` tokens, and a step takes `batch` of them. `top_k`: how many of
    the teacher's probabilities for each token are kept; the mass of all others is one number more. After `patience` of the
    `evaluations` on `heldout` windows without a lower divergence training ends; what had the lowest is kept.
    """

    step: ClassVar[str] = "distill"  # its key in a recipe

    tokens: Count = Field(400_000, ge=1)
    length: Count = Field(512, ge=2)
    batch: Count = Field(4, ge=1)
    lr: float = Field(4e-3, gt=0, lt=1, strict=True)
    warmup: float = Field(0.1, ge=0, le=1)
    clip: float = Field(1.0, gt=0)  # the largest norm of a step's gradient
    loss: Literal["forward", "reverse", "mixed"] = "forward"  # KL(teacher, student), KL(student, teacher), their mean
    temperature: float = Field(1.0, gt=0)
    top_k: Count = Field(64, ge=1)
    embeddings: bool = Field(False, strict=True)  # the token embeddings and the output head are trained too
    hidden: HiddenSpec | None = None  # a number is its weight
    taid: TaidSpec | None = None  # true: with every default
    data: DataSpec | None = None  # None: windows of the calibration's texts as they come
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"  # 8 bits: of bitsandbytes, which is installed apart
    products: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: as the weights are stored; bfloat16 for float16
    checkpointing: bool = Field(False, strict=True)  # activations inside blocks are computed again, and not kept
    heldout: Count = Field(16, ge=2)
    evaluations: Count = Field(10, ge=1)
    patience: Count = Field(3, ge=1)
    last: Count | None = Field(None, ge=1)  # only so many of the last blocks are trained; None: all

    @property
    def windows(self) -> int:
        """How many are trained on, or chosen from."""
        return math.ceil(self.tokens / self.length / (self.data.budget if self.data else 1))

    @field_validator("taid", mode="before")
    @classmethod
    def _off(cls, raw: Any) -> Any:
        return None if raw is False else raw


class LoraSpec(DistillSpec):
    """As `distill`, of pairs of small matrices beside each stored one, which are part of it at every step: all is merged.

    `alpha / rank` times the product of a pair is added, where a mask keeps numbers. `targets`: layers, as globs on their
    names or any dotted part of these. `lr` is the largest step's change of a weight relative to its root mean square.
    """

    step: ClassVar[str] = "lora"

    rank: Count = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0, allow_inf_nan=False)
    targets: tuple[str, ...] = Field(("*",), min_length=1)

    @model_validator(mode="after")
    def _blocks_alone(self) -> Self:
        if self.embeddings:
            raise PydanticCustomError("embeddings", "lora trains layers of the blocks alone; embeddings are of distill")
        return self


class RecoverStep(Strict):
    """One step of the recovery: `reconstruct` tunes block by block on the calibration windows, `distill` the whole model.

    `lora` trains adapters of the whole model, which end as part of its weights.
    """

    reconstruct: ReconstructSpec | None = None
    distill: DistillSpec | None = None
    lora: LoraSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len([spec for spec in (self.reconstruct, self.distill, self.lora) if spec is not None]) != 1:
            raise PydanticCustomError("step", "each step is either reconstruct, distill or lora")
        return self

    @property
    def spec(self) -> ReconstructSpec | DistillSpec:
        """The settings of the step."""
        spec = self.reconstruct or self.distill or self.lora
        assert spec is not None
        return spec
