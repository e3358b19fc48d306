"""The steps that win quality back."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from paredown.compress.recipe.spec import Count, Strict


class ReconstructSpec(Strict):
    """Tune each compressed block towards the dense block's output: `steps` of Adam on `batch` windows each.

    `lr` is the first step's size relative to the root mean square of each tensor; it falls linearly to zero. `heldout`: so
    many of the calibration windows are not trained on, and tell when to stop; 0: all steps are taken.
    """

    steps: Count = Field(150, ge=1)
    lr: float = Field(5e-3, gt=0, strict=True)
    batch: Count = Field(8, ge=1)
    heldout: Count = Field(0, ge=0)


class DistillSpec(Strict):
    """Train what a compressed checkpoint stores towards the dense model's next-token probabilities.

    `lr` is the largest step's size relative to the root mean square of each tensor: it rises during the share `warmup` of
    the steps, and falls along a cosine. Windows have `length` tokens, and a step takes `batch` of them. `top_k`: how many of
    the teacher's probabilities for each token are kept; the mass of all others is one number more. After `patience` of the
    `evaluations` on `heldout` windows without a lower divergence training ends; what had the lowest is kept.
    """

    tokens: Count = Field(400_000, ge=1)
    length: Count = Field(512, ge=2)
    batch: Count = Field(4, ge=1)
    lr: float = Field(5e-3, gt=0, lt=1, strict=True)
    warmup: float = Field(0.1, ge=0, le=1)
    clip: float = Field(1.0, gt=0)  # the largest norm of a step's gradient
    loss: Literal["forward", "reverse", "mixed"] = "forward"  # KL(teacher, student), KL(student, teacher), their mean
    temperature: float = Field(1.0, gt=0)
    top_k: Count = Field(64, ge=1)
    embeddings: bool = Field(False, strict=True)  # the token embeddings and the output head are trained too
    products: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: as the weights are stored; bfloat16 for float16
    checkpointing: bool = Field(False, strict=True)  # activations inside blocks are computed again, and not kept
    heldout: Count = Field(16, ge=2)
    evaluations: Count = Field(10, ge=1)
    patience: Count = Field(3, ge=1)


class RecoverStep(Strict):
    """One step of the recovery: `reconstruct` tunes block by block on the calibration windows, `distill` the whole model."""

    reconstruct: ReconstructSpec | None = None
    distill: DistillSpec | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.reconstruct is None) == (self.distill is None):
            raise PydanticCustomError("step", "each step is either reconstruct or distill")
        return self

    @property
    def spec(self) -> ReconstructSpec | DistillSpec:
        """The settings of the step."""
        spec = self.reconstruct or self.distill
        assert spec is not None
        return spec
