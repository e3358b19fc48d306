"""The recipe: what is done to a model, strict and whole before anything is downloaded or loaded."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from paredown.compress.allocation.spec import AllocationSpec
from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.recipe.reading import changed, listed, read, shipped_names
from paredown.compress.recipe.recovery import ReconstructSpec, RecoverStep
from paredown.compress.recipe.spec import CalibrationSpec, EvaluateSpec, Strict, Targets
from paredown.compress.recipe.yaml import shown
from paredown.compress.registry import load_plugin
from paredown.compress.text.corpus import Bos

if TYPE_CHECKING:
    from paredown.compress.methods import Method

STAGES = "stages"  # stands for a method where a recipe has several

# Through what the calibration text has come when a layer's statistics are taken: the edited blocks before, or the edited
# layers before of its own block too, or dense blocks only. A method that compares with the dense model takes them in turn.
Order = Literal["block", "true_sequential", "independent"]


class _About(Strict):
    """What a recipe says of itself."""

    name: str | None = None
    description: str | None = None
    citation: str | None = None


class Stage(Strict):
    """One method with its options and targets."""

    method: str
    options: dict[str, Any] = Field(default={})
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
            raise PydanticCustomError("order", "reconstruct comes before distill and lora, which would be undone")
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
        raw = changed(raw, origin, overrides, cls.model_fields)
        recipe, faults = cls._form(raw)
        plugins = raw.get("plugins") or ()
        for plugin in plugins if isinstance(plugins, list | tuple) else ():
            _run_plugin(str(plugin))
        stages = raw.get("stages") or ()
        for i, stage in enumerate(stages if isinstance(stages, list | tuple) else ()):
            faults += [f"stages.{i}: {fault}" for fault in _option_faults(stage)]
        faults += [] if stages else _option_faults(raw)
        if faults or recipe is None:
            raise listed(origin, faults)
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
        raw = changed(read(name_or_path), name_or_path, overrides, cls.model_fields)
        recipe, faults = cls._form(raw)
        if faults or recipe is None:
            raise listed(name_or_path, faults)
        return recipe

    @classmethod
    def load(cls, name_or_path: str, overrides: Sequence[str] = (), plugins: Sequence[str | Path] = ()) -> "Recipe":
        """A shipped recipe by name, or a YAML file; `overrides` are `key.sub=value` (bare option names work too).

        `plugins` are Python files to run beside those that the recipe names, whose paths count from its own folder.
        """
        raw = read(name_or_path)
        own = raw.get("plugins") or []
        folder = Path(name_or_path).parent
        raw["plugins"] = [str(folder / str(p)) for p in own] if isinstance(own, list) else own
        if isinstance(raw["plugins"], list):
            raw["plugins"] += [str(path) for path in plugins]
        return cls.parse(raw, name_or_path, overrides)


@cache
def shipped_recipes() -> dict[str, Recipe]:
    """The recipes that come with the package, by name."""
    return {name: Recipe.load(name) for name in shipped_names()}


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
