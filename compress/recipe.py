"""The recipe: what is done to a model, strict and whole before anything is downloaded or loaded."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from paredown.compress.allocation.spec import AllocationSpec
from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.recipe_yaml import oddity, parse_yaml, shown
from paredown.compress.registry import load_plugin
from paredown.compress.text.corpus import Bos

if TYPE_CHECKING:
    from paredown.compress.methods import Method

MOST_BYTES = 1 << 18  # of a recipe's file
STAGES = "stages"  # stands for a method where a recipe has several

Count = Annotated[int, Field(strict=True, le=1 << 40)]  # a bool or "3" is no count
# Through what the calibration text has come when a layer's statistics are taken: the edited blocks before, or the edited
# layers before of its own block too, or dense blocks only. A method that compares with the dense model takes them in turn.
Order = Literal["block", "true_sequential", "independent"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Targets(_Strict):
    """Which linears are edited: globs on a layer's full name or on any dotted part of it."""

    include: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("lm_head",)


class SourceSpec(_Strict):
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


class GenerateSpec(_Strict):
    """How the model writes the text `self`: by sampling, from the start of a text or from places of the text `prefixes`."""

    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    prefixes: str | None = None


class CalibrationSpec(_Strict):
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


class EvaluateSpec(_Strict):
    """On what the model is scored before and after. `windows` caps how many windows of a corpus are read."""

    perplexity: tuple[str, ...] = ("stdlib",)
    tasks: tuple[str, ...] = ()
    length: Count = Field(2048, ge=2)
    windows: Count | None = Field(None, ge=1)


class ReconstructSpec(_Strict):
    """Tune each compressed block towards the dense block's output: `steps` of Adam on `batch` windows each.

    `lr` is the first step's size relative to the root mean square of each tensor; it falls linearly to zero. `heldout`: so
    many of the calibration windows are not trained on, and tell when to stop; 0: all steps are taken.
    """

    steps: Count = Field(150, ge=1)
    lr: float = Field(5e-3, gt=0, strict=True)
    batch: Count = Field(8, ge=1)
    heldout: Count = Field(0, ge=0)


class DistillSpec(_Strict):
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


class RecoverStep(_Strict):
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


class _About(_Strict):
    """What a recipe says of itself."""

    name: str | None = None
    description: str | None = None
    citation: str | None = None


class Stage(_Strict):
    """One method with its options and targets."""

    method: str
    options: dict[str, Any] = {}
    targets: Targets = Targets()
    idle: Literal["data_free", "dense"] = "data_free"  # what becomes of a layer that no calibration token reached
    order: Order = "block"
    router_weight: bool = Field(False, strict=True)  # each token counts in an expert's statistics as in its output
    allocation: AllocationSpec | None = None  # of ranks or sparsities; None: as the method does by itself
    reconstruct: ReconstructSpec | None = None


class Recipe(Stage, _About):
    """One method, or several as `stages` one after another, with calibration and evaluation."""

    method: str = STAGES
    calibration: CalibrationSpec = CalibrationSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    bos: Bos = "auto"  # every window and task begins with a BOS if the tokenizer adds one; none: the papers' protocol
    stages: tuple[Stage, ...] = ()  # each works on what the one before left; then there is no method beside them
    recover: tuple[RecoverStep, ...] = ()  # after the last stage, or, without any method, of a checkpoint that is named
    plugins: tuple[str, ...] = ()  # Python files that register methods, masks, updates or allocations; they are run

    @field_validator("recover")
    @classmethod
    def _in_order(cls, steps: tuple[RecoverStep, ...]) -> tuple[RecoverStep, ...]:
        """Blocks are tuned from the dense model's embedding on, which distillation may change."""
        kinds = [step.reconstruct is None for step in steps]
        if kinds != sorted(kinds):
            raise PydanticCustomError("order", "reconstruct comes before distill, which would be undone")
        return steps

    @property
    def compresses(self) -> bool:
        """Whether it has a method, and not only steps that recover what is compressed already."""
        return self.method != STAGES or bool(self.stages)

    @property
    def each_stage(self) -> "list[Recipe]":
        """A recipe for each stage; calibration and evaluation are those of the whole."""
        own = {*Stage.model_fields, "stages", "recover"}
        common = {key: value for key, value in self.to_dict().items() if key not in own}
        return [Recipe.model_validate({**common, **stage.model_dump(exclude_none=True)}) for stage in self.stages]

    def build(self) -> "Method":
        """The method with its options. Raises PareError listing every fault of theirs, and if there is no method."""
        if not self.compresses:
            raise PareError(
                "this recipe has no method: it recovers a checkpoint that is compressed already. "
                "Type: paredown recover OUT --teacher MODEL -r RECIPE -o NEW"
            )
        return _build(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `parse` takes."""
        unsaid = {key for key in ("plugins", "stages", "recover") if not getattr(self, key)}
        unsaid |= set(Stage.model_fields) if self.method == STAGES else set()
        return self.model_dump(mode="json", exclude_none=True, exclude=unsaid)

    @classmethod
    def parse(cls, raw: Any, origin: str = "recipe", overrides: Sequence[str] = ()) -> "Recipe":
        """From plain data; `overrides` as in `load`. Raises PareError listing every fault, also of the method's options."""
        raw = _changed(raw, origin, overrides)
        recipe, faults = cls._form(raw)
        plugins = raw.get("plugins") or ()
        for plugin in plugins if isinstance(plugins, list | tuple) else ():
            _run_plugin(str(plugin))
        stages = raw.get("stages") or ()
        for i, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
            faults += [f"stages.{i}: {fault}" for fault in _option_faults(stage)]
        faults += [] if stages else _option_faults(raw)
        if faults or recipe is None:
            raise _listed(origin, faults)
        return recipe

    @classmethod
    def _form(cls, raw: dict[str, Any]) -> "tuple[Recipe | None, list[str]]":
        """The recipe by its keys alone, and what is wrong with them; the options of its methods are not looked at."""
        faults, recipe, stages = list[str](), None, raw.get("stages") or ()
        try:
            recipe = cls.model_validate(raw)
        except ValidationError as fault:
            faults += [_sentence(error) for error in fault.errors()]
        if stages and (beside := [key for key in Stage.model_fields if key in raw]):
            faults.append(f"{' and '.join(beside)} beside stages: write them in each stage.")
        elif "method" not in raw and not stages and not raw.get("recover"):
            faults.append("method: this key is required.")
        return recipe, faults

    @classmethod
    def outline(cls, name_or_path: str, overrides: Sequence[str] = ()) -> "Recipe":
        """As `load`, but no plugin is run and the options of its methods are not looked at: torch need not be imported."""
        raw = _changed(_read(name_or_path), name_or_path, overrides)
        recipe, faults = cls._form(raw)
        if faults or recipe is None:
            raise _listed(name_or_path, faults)
        return recipe

    @classmethod
    def load(cls, name_or_path: str, overrides: Sequence[str] = (), plugins: Sequence[str | Path] = ()) -> "Recipe":
        """A shipped recipe by name, or a YAML file; `overrides` are `key.sub=value` (bare option names work too).

        `plugins` are Python files to run beside those that the recipe names, whose paths count from its own folder.
        """
        raw = _read(name_or_path)
        own = raw.get("plugins") or []
        folder = Path(name_or_path).parent
        raw["plugins"] = [str(folder / str(p)) for p in own] if isinstance(own, list) else own
        if isinstance(raw["plugins"], list):
            raw["plugins"] += [str(path) for path in plugins]
        return cls.parse(raw, name_or_path, overrides)


def shipped_names() -> list[str]:
    """The names of the recipes that come with the package, sorted."""
    names = (f.name for f in files("paredown.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@cache
def shipped_recipes() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    return {name: Recipe.load(name) for name in shipped_names()}


def _read(name_or_path: str) -> dict[str, Any]:
    try:
        text = _text_of(name_or_path)
    except OSError as fault:
        raise PareError(f"the recipe {name_or_path} cannot be read: {fault.strerror}.") from fault
    except UnicodeDecodeError as fault:
        raise PareError(f"{name_or_path} is no UTF-8 text: {fault}. Save it as UTF-8.") from fault
    try:
        raw = parse_yaml(text)
    except PareError as fault:
        raise PareError(f"{name_or_path} is no valid YAML: {fault}") from fault
    if not isinstance(raw, dict):
        raise PareError(f"{name_or_path}: a recipe is a mapping with at least the key 'method'; found {shown(raw)}.")
    if odd := oddity(raw):
        raise PareError(f"{name_or_path}: {odd}")
    return raw


def _text_of(name_or_path: str) -> str:
    """The YAML of a shipped recipe or of a file."""
    path = Path(name_or_path)
    if not path.suffix and not path.is_file():  # a folder may well be called as a recipe is
        known = shipped_names()
        if name_or_path not in known:
            raise PareError(
                f"no recipe is called {shown(name_or_path)}, and no such file exists."
                f"{did_you_mean(name_or_path, known)} List them with: paredown recipes"
            )
        return (files("paredown.recipes") / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    if path.is_dir():
        raise PareError(f"the recipe {name_or_path} is a folder. Name a YAML file in it, or a shipped recipe.")
    if not path.exists():
        raise PareError(f"the recipe file {name_or_path} does not exist. List shipped recipes with: paredown recipes")
    with path.open("rb") as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise PareError(f"{name_or_path} is no recipe: it has more than {MOST_BYTES:,} bytes. Name a short YAML file.")
    return content.decode("utf-8")


def _changed(raw: Any, origin: str, overrides: Sequence[str]) -> dict[str, Any]:
    """A raw recipe with the `overrides` in it. Raises PareError if it is none, or holds what no recipe needs."""
    if not isinstance(raw, dict):
        raise PareError(f"{origin}: a recipe is a mapping with at least the key 'method'; found {shown(raw)}.")
    changed: dict[str, Any] = deepcopy(raw) if overrides else raw
    for override in overrides:
        _override(changed, override)
    if odd := oddity(changed):
        raise PareError(f"{origin}: {odd}")
    return changed


def _listed(origin: str, faults: Sequence[str]) -> PareError:
    return PareError(f"{origin}: " + ("\n  ".join(["", *faults]) if len(faults) > 1 else faults[0]))


def _override(raw: dict[str, Any], override: str) -> None:
    """Apply one `key.sub=value` to the raw recipe, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise PareError(f"--set {shown(override)} must look like key=value, as in --set calibration.sequences=64.")
    path = key.split(".")
    if len(path) == 1 and path[0] not in Recipe.model_fields:
        path = ["options", *path]
    node: Any = raw
    for part in path[:-1]:
        if isinstance(node, list) and part.isdigit() and int(part) < len(node):  # a stage
            node = node[int(part)]
        else:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict | list):
            raise PareError(f"--set {shown(override)}: {part!r} holds a value, not keys.")
    if not isinstance(node, dict):
        raise PareError(f"--set {shown(override)}: name a stage by its number, as in stages.0.options.kept=0.8.")
    # on the command line nobody quotes 2:4, which YAML would read as a number to the base of 60
    pattern = text.replace(":", "").strip().isdigit() and ":" in text
    try:
        value = text.strip() if pattern else parse_yaml(text)
    except PareError as fault:
        told = f"--set {shown(override)}: {shown(text)} is no valid YAML"
        raise PareError(f"{told} ({fault}). Close its brackets and quotes.") from fault
    if odd := oddity(value, key):
        raise PareError(f"--set {shown(override)}: {odd}")
    node[path[-1]] = value
    for one, other in (("source", "sources"), ("sources", "source")):
        if path == ["calibration", one]:
            node.pop(other, None)


def _build(method: str, options: dict[str, Any]) -> "Method":
    """A method with its options. For the first of them all methods are imported, and torch with them."""
    from paredown.compress.methods import build

    return build(method, options)


def _run_plugin(name: str) -> None:
    try:
        load_plugin(Path(name))
    except OSError as fault:
        raise PareError(f"the plugin {shown(name)} cannot be read: {fault.strerror}.") from fault


def _option_faults(raw: Any) -> list[str]:
    """What is wrong with the options of a stage's method and allocation."""
    if not isinstance(raw, dict):
        return []
    faults: list[str] = []
    method, options, allocation = raw.get("method"), raw.get("options") or {}, raw.get("allocation")
    if isinstance(method, str) and isinstance(options, dict):
        faults += _faults_of(lambda: _build(method, options))
    if isinstance(allocation, dict) and isinstance(allocation.get("strategy"), str):
        faults += _faults_of(lambda: AllocationSpec.model_validate(allocation).build())
    return faults


def _faults_of(build: Callable[[], object]) -> list[str]:
    """What is wrong with something's options, a sentence each."""
    try:
        build()
    except PareError as fault:
        return str(fault).splitlines()
    return []


def _sentence(error: Any) -> str:
    """One fault of pydantic's in our words."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        fields: dict[str, Any] = Recipe.model_fields
        for part in (p for p in error["loc"][:-1] if isinstance(p, str)):  # the others are places in a list
            fields = _model(fields[str(part)].annotation).model_fields
        return f"{path}: there is no such key.{did_you_mean(str(error['loc'][-1]), fields)} Keys: {', '.join(fields)}."
    if error["type"] == "missing":
        return f"{path}: this key is required."
    return f"{path}: {error['msg']}; found {shown(error['input'])}."


def _model(annotation: Any) -> Any:
    """The model of a field, also of one that may be null, and of the items of a list."""
    parts = (_model(part) for part in get_args(annotation))
    return annotation if hasattr(annotation, "model_fields") else next((model for model in parts if model), None)
