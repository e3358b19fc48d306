"""The interface of a method, with a default for all but `compress`: a method overrides what differs.

@register("mine")
@dataclass(frozen=True)
class Mine(WeightMethod):
    sparsity: Sparsity = 0.5          # fields are the options of a recipe

    needs = frozenset({Need.GRAM})    # the statistics that `compress` reads

    def compress(self, weight, stats): ...
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from paredown.compress.errors import PareError, did_you_mean
from paredown.compress.numerics.edits import WeightEdit
from paredown.compress.numerics.moments import InputStats, Labels, Need, Stats
from paredown.compress.registry import Registry
from paredown.compress.storage.spec import Spec

# relative to the mean diagonal of H, to whose diagonal it is added
Damping = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Shape = tuple[int, int]  # (out, in)
Shares = Literal["any", "many", "few"]
Share = Annotated[float, Field(gt=0, lt=1)]
# units of a group: channels of an MLP; key/value heads, each with its query heads; heads of a state space; experts
Kind = Literal["channels", "kv_groups", "ssm_heads", "experts"]
# a block that stays: of which of the dense model's blocks it is the sum, and how often each counts; its own is the first
Mix = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Choice:
    """One way to compress a layer, as an allocation sees it."""

    numbers: int  # how many are stored
    loss: float  # predicted; nan without a weight and its statistics
    option: Any  # for `at`, such as a rank; None: a weight of zeros, which no allocation may choose


class Method:
    """Whatever a recipe can name as its method."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics of each layer that it reads. They may depend on its options."""
        return frozenset()

    @property
    def labels(self) -> Labels:
        """Whose next tokens its gradients predict, if it needs gradients: the text's or the model's own."""
        return "data"

    @property
    def remark(self) -> str | None:
        """A sentence about the method that belongs in the report."""
        return None

    @property
    def gradient_windows(self) -> int | None:
        """On how many calibration windows gradients are taken; None: on all."""
        return None


class WeightMethod(Method):
    """Edits one weight matrix at a time."""

    # its edits are products of smaller weights, which round unlike the dense product
    chain: ClassVar[bool] = False
    surveys_angles: ClassVar[bool] = False  # `chosen_blocks` reads the angles
    predicts: ClassVar[bool] = True  # the losses of its choices predict those of its edits
    # those losses are weighed by moments of output gradients where the statistics hold some, else by inputs alone
    weighs: ClassVar[bool] = False

    @property
    def strategy(self) -> str | None:
        """The allocation, if the recipe names none; None: there is nothing to allocate."""
        return None

    @property
    def spread(self) -> Mapping[str, Any]:
        """The options of that allocation."""
        return {}

    @property
    def reads_pairs(self) -> bool:
        """Whether losses of choices are predicted from tokens themselves: `Stats.pairs`."""
        return False

    @abstractmethod
    def compress(self, weight: Tensor, stats: Stats) -> WeightEdit | None:
        """A pure function of the weight (out, in) and its layer's statistics; None leaves the weight as it is.

        Raises PareError if this weight cannot be compressed so.
        """

    def expect(self, shape: Shape, element_size: int) -> Spec | None:
        """How a weight of this shape will be stored; None if it stays dense, or if only the data can tell.

        Raises PareError if no weight of this shape can be compressed so.
        """
        return None

    def working_bytes(self, shape: Shape) -> int:
        """Memory that `compress` takes besides the weight and its statistics. By default two float32 copies and masks."""
        return 10 * shape[0] * shape[1]

    def chosen_blocks(self, angles: Sequence[float]) -> list[int]:
        """Indices of the blocks that it edits. `angles`, one per block in units of pi: how far each turns its input.

        A plan passes zeros.
        """
        return list(range(len(angles)))

    @property
    def budget(self) -> "Budget":
        """How much all layers together may keep."""
        return Budget()

    def choices(self, shape: Shape, weight: Tensor | None = None, stats: Stats | None = None) -> list[Choice]:
        """Ways to compress a weight of this shape, smallest first, all smaller than the dense one; []: nothing to allocate.

        The first is a weight of zeros. Losses are predicted if `weight` (out, in) and its statistics are given.
        """
        return []

    @property
    def shares(self) -> "Shares":
        """Which shares of a weight it can keep: any, with the fraction removed as option, or those of its choices."""
        return "many"

    def own_option(self, weight: Tensor, stats: Stats) -> Any:
        """The option that a weight's own data choose, where the budget is `by_data`; None leaves the weight as it is."""
        return None

    def at(self, option: Any) -> "WeightMethod":
        """The method for the `option` of one of its choices."""
        return self

    @property
    def surveyed(self) -> "WeightMethod":
        """The method without what its survey of the dense model does not depend on, such as how much is kept."""
        return self

    def without_bias(self) -> "WeightMethod | None":
        """The same method for layers without a bias that cannot get one; None if it has to add one."""
        return self

    def for_layer(self, name: str) -> "WeightMethod":
        """The same method as it treats the layer of that name."""
        return self

    def for_experts(self) -> "WeightMethod":
        """The same method for the experts of a fused weight, none of which can get a bias."""
        return self


@dataclass(frozen=True)
class Budget:
    """How much a method is asked to keep, as a share or a count of parameters; neither: each layer decides by itself."""

    share: float | None = None  # of the targeted parameters
    parameters: int | None = None  # of the whole model
    asked: bool = False  # the recipe's options say how much is kept, in whatever way
    by_data: bool = False  # each layer's option depends on its own data

    @property
    def shared(self) -> bool:
        """Whether all layers share one budget."""
        return self.share is not None or self.parameters is not None


@dataclass(frozen=True)
class Part:
    """Where the units of a group lie in one tensor: along dimension `dim`, `width` entries each, from entry `first` on."""

    name: str  # of the parameter, in full: model.layers.0.mlp.gate_proj.weight
    dim: int
    width: int = 1
    first: int = 0


@dataclass(frozen=True)
class Group:
    """Coupled units: each can only be removed from all parts at once."""

    name: str  # of the module that holds them: model.layers.0.mlp
    kind: Kind
    units: int
    parts: tuple[Part, ...]
    reader: str  # the view whose inputs the units are: model.layers.0.mlp.down_proj; "" of experts
    config_key: str  # of the number of units in config.json
    # keys that count what units have, such as query heads, and how many one unit has
    further: tuple[tuple[str, int], ...] = ()
    # keys that must be given, lest something else changes with those above, and their values
    fixed: tuple[tuple[str, int], ...] = ()
    inner: tuple[
        Part, ...
    ] = ()  # of experts: where the hidden channels of each lie, the reader's part last; () if unknown

    @property
    def vector(self) -> int:
        """How many columns of the reader side by side are one vector: those of a query head; otherwise each is one."""
        heads = max([1, *(each for key, each in self.further if "head" in key)])
        return self.parts[-1].width // heads if self.are_heads else 1

    @property
    def are_heads(self) -> bool:
        """Whether units mix tokens, each by itself."""
        return self.kind in ("kv_groups", "ssm_heads")


@dataclass(frozen=True)
class Units:
    """A group as a method reads it."""

    group: Group
    weight: Tensor  # of the reader (out, units * width): `width` columns for each unit
    writers: Mapping[str, Tensor]  # the matrices whose rows the units are, by view name (units * width, in)
    stats: Stats  # of the reader's input, and of the gradient at its output
    inputs: Mapping[str, InputStats] = field(default_factory=dict)  # of the writers, if the method reads them

    @property
    def width(self) -> int:
        """How many columns of the reader a unit has."""
        return self.weight.shape[1] // self.group.units


@dataclass(frozen=True)
class Sliced:
    """Which units of a group stay, and what changes besides."""

    keep: Tensor  # (units,) bool
    weight: Tensor | None = None  # of the reader, for the columns that stay (out, kept); None: as they were
    shift: Tensor | None = None  # what the reader's bias gains (out,)
    # of each unit the one that stays and into whose mean it goes, in all parts but the reader's (units,) int64
    into: Tensor | None = None


@dataclass(frozen=True)
class GroupMethod(Method):
    """Removes units of a group from every block: as many as its options say."""

    of_units: ClassVar[bool] = False  # `kept` is a share of the units, not of the parameters of all blocks
    reads_writers: ClassVar[bool] = False  # `inputs` of Units

    kept: Share | None = None  # of the parameters of all blocks
    units: Annotated[int, Field(ge=1)] | None = None  # of each group
    # of which the number of units that stay is one, unless it is given; None: 32 of channels, 1 of others
    multiple: Annotated[int, Field(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.kept is None and self.units is None:
            raise PareError("how many units stay is not said: give kept, a share such as 0.8, or units, their number.")
        if self.kept is not None and self.units is not None:
            raise PareError("kept and units say how many units stay in different ways: give one of them.")

    @property
    def kind(self) -> Kind:
        """Of the groups."""
        return "channels"

    @property
    def step(self) -> int:
        """Of which the number of units that stay is a multiple, unless it is given."""
        return self.multiple or (32 if self.kind == "channels" else 1)

    @property
    def shifts(self) -> bool:
        """Whether the reader's bias gains something."""
        return False

    @property
    def shrink(self) -> float:
        """How much of the way uneven numbers of units go back to equal ones, from 0 to 1."""
        return 0.5

    @property
    def uneven(self) -> bool:
        """Groups of different blocks may keep different numbers of units."""
        return False

    @abstractmethod
    def compress(self, units: Units, keep: int) -> Sliced:
        """The group with `keep` units left."""

    def curve(self, units: Units, counts: Sequence[int]) -> Iterator[Sliced]:
        """What `compress` gives for each of these numbers of units."""
        return (self.compress(units, keep) for keep in counts)

    def working_bytes(self, shape: Shape) -> int:
        """Memory that `compress` takes besides a reader's weight of this shape (out, in) and its statistics."""
        return 8 * shape[0] * shape[1]


@dataclass(frozen=True)
class Profile:
    """What is measured of the dense model's blocks, for a choice among them. Lists are by block."""

    similarity: Sequence[float] = ()  # mean cosine of a token's hidden states before and after the block
    last: Tensor | None = None  # hidden states of each window's last token before each block, and at the end
    # (windows, blocks + 1, hidden)
    removals: Sequence[tuple[int, float]] = ()  # the best order of removal, and what `reads` says after each, in nats
    # mean cosine between the last hidden states of the dense model and of one made of such blocks
    similar: Callable[[Sequence[Mix]], float] | None = None


@dataclass(frozen=True)
class BlockMethod(Method):
    """Removes whole blocks."""

    # of the Profile: what is measured
    reads: ClassVar[Literal["nothing", "states", "divergence", "loss", "merges"]] = "nothing"
    refits: ClassVar[bool] = False  # layers that write to the residual stream are fitted to the dense one

    kept: Share | None = None  # of the parameters of all blocks
    blocks: Annotated[int, Field(ge=1)] | None = None  # how many stay

    def __post_init__(self) -> None:
        if self.kept is None and self.blocks is None:
            raise PareError(
                "how many blocks stay is not said: give kept, a share such as 0.8, or blocks, their number."
            )
        if self.kept is not None and self.blocks is not None:
            raise PareError("kept and blocks say how many blocks stay in different ways: give one of them.")

    @property
    def windows(self) -> int:
        """On how many windows divergences and merges are measured."""
        return 8

    @property
    def damping(self) -> float:
        """Of the fit, relative to the mean square of a layer's input."""
        return 0.1

    @abstractmethod
    def choose(self, profile: Profile, count: int, drop: int) -> list[int]:
        """Which `drop` of `count` blocks go, in order."""

    def stay(self, profile: Profile, count: int, drop: int) -> list[Mix]:
        """What the others become, in order: by default they stay as they are."""
        gone = self.choose(profile, count, drop)
        return [((i, 1.0),) for i in range(count) if i not in gone]


@dataclass(frozen=True)
class SublayerMethod(Method):
    """Removes attention or MLPs of single blocks, one after another: each time what costs least."""

    kept: Share | None = None  # of the parameters of all blocks
    drop: Annotated[int, Field(ge=1)] | None = None  # how many go

    def __post_init__(self) -> None:
        if self.kept is None and self.drop is None:
            raise PareError(
                "how much stays is not said: give kept, a share such as 0.8, or drop, how many sublayers go."
            )
        if self.kept is not None and self.drop is not None:
            raise PareError("kept and drop say how much stays in different ways: give one of them.")

    @property
    def which(self) -> Literal["any", "attention", "mlp"]:
        """Which may go: those that mix tokens, or those that do not."""
        return "any"

    @property
    def windows(self) -> int:
        """On how many windows the losses are measured."""
        return 8

    @abstractmethod
    def cost(self, loss: float, before: float, numbers: int) -> float:
        """Of the removal of a sublayer of so many parameters: `loss` is the model's without it, `before` with it, in nats."""


def check_needs(name: str, owner: object) -> None:
    """Raises PareError if `owner.needs`, of a class or an object, is no set of statistics that are collected."""
    needs: object = getattr(owner, "needs", frozenset())
    if isinstance(needs, property):
        return  # depends on the options: the object is checked when it is built
    if not isinstance(needs, set | frozenset):
        raise PareError(
            f"{name}: `needs` must be a set of statistics, such as frozenset({{Need.GRAM}}), not {needs!r}."
        )
    known = [str(need) for need in Need]
    for need in needs:
        if need not in known:
            raise PareError(
                f"{name} needs the statistic {str(need)!r}, which is not collected.{did_you_mean(str(need), known)} "
                f"Known: {', '.join(known)}."
            )


def check_method(name: str, cls: type) -> None:
    """Raises PareError for a class that no run can use."""
    if not issubclass(cls, WeightMethod | GroupMethod | BlockMethod | SublayerMethod):
        raise PareError(
            f"{name}: {cls.__qualname__} is no method. Derive it from WeightMethod, GroupMethod, BlockMethod or "
            "SublayerMethod."
        )
    check_needs(name, cls)


METHODS: Registry[Method] = Registry("method", "paredown.compress.methods", check_method, check_needs)
register = METHODS.register
