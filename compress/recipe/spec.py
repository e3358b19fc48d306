"""What most recipes say: on which layers, on what text, and how the result is scored."""

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

Count = Annotated[int, Field(strict=True, le=1 << 40)]  # a bool or "3" is no count


class Strict(BaseModel):
    """Nothing but its keys, and what was read does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Targets(Strict):
    """Which linears are edited: globs on a layer's full name or on any dotted part of it."""

    include: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("lm_head",)


class SourceSpec(Strict):
    """One of several calibration texts, or its name alone: `weight` is its share of the windows, relative to the others'.

    `chat`: only a column of conversations will do. Without it one is found where there is no column of text.
    """

    source: str
    weight: float = Field(1.0, gt=0, strict=True, allow_inf_nan=False)
    chat: bool = Field(False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _name(cls, raw: Any) -> Any:
        return {"source": raw} if isinstance(raw, str) else raw


class GenerateSpec(Strict):
    """How the model writes the text `self`: by sampling, from the start of a text or from places of the text `prefixes`."""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    prefixes: str | None = None


class CalibrationSpec(Strict):
    """On what text the statistics are taken: one `source`, or several `sources`. `length` is capped by what the model allows.

    `domain` is a further text, cut in the same way: gradients of the loss are taken on it, and not on `source`.
    `allow_scored`: text that is scored too may calibrate, all of it; the report has a warning then.
    """

    source: str | None = None
    sources: tuple[SourceSpec, ...] | None = None
    chat: bool = Field(False, strict=True)
    generate: GenerateSpec | None = None
    domain: str | None = None
    sequences: Count = Field(128, ge=1)
    length: Count = Field(2048, ge=2)
    seed: Count = Field(0, ge=0)
    allow_scored: bool = Field(False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _by_default(cls, raw: Any) -> Any:
        """Without any text: the standard library's."""
        named = isinstance(raw, dict) and {"source", "sources"} & raw.keys()
        return raw if named or not isinstance(raw, dict) else {**raw, "source": "stdlib"}

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.source is None) == (self.sources is None):
            raise PydanticCustomError("sources", "name either one source or a list of sources")
        if self.sources is not None and (self.chat or not self.sources):
            raise PydanticCustomError("sources", "each of sources has a source, and chat if it holds conversations")
        return self

    @property
    def texts(self) -> tuple[SourceSpec, ...]:
        """The texts that calibrate."""
        return self.sources or (SourceSpec(source=self.source or "", chat=self.chat),)

    @property
    def named(self) -> str:
        """What calibrates, in words; gradients left aside."""
        return ", ".join(text.source for text in self.texts)


class EvaluateSpec(Strict):
    """On what the model is scored before and after. `windows` caps how many windows of a corpus are read."""

    perplexity: tuple[str, ...] = ("stdlib",)
    tasks: tuple[str, ...] = ()
    length: Count = Field(2048, ge=2)
    windows: Count | None = Field(None, ge=1)
