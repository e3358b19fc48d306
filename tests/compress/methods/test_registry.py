"""The registries: what may register, what is refused and when, and how options reach the two parts of `masked`."""

import sys
from dataclasses import dataclass

import pytest
import torch

from paredown.compress.allocation.base import ALLOCATIONS
from paredown.compress.errors import PareError
from paredown.compress.methods import MASKS, METHODS, UPDATES, GroupMethod, WeightMethod, build, register
from paredown.compress.methods.base import check_method, check_needs
from paredown.compress.methods.lowrank.svd import SVD
from paredown.compress.numerics.moments import Need
from paredown.compress.numerics.sweep import fixed_mask
from paredown.compress.registry import Registry


@pytest.fixture
def registry():
    """Of methods, with none in it."""
    return Registry("method", "paredown.compress.methods", check_method, check_needs)


def define(scale=1.0, **members):
    """A method, always of the same name in the same place."""

    @dataclass(frozen=True)
    class Mine(WeightMethod):
        size: float = scale

        def compress(self, weight, stats):
            return None

    for name, value in members.items():
        setattr(Mine, name, value)
    return Mine


def test_a_name_that_another_class_has_is_refused_and_the_first_one_stays(registry):
    first = registry.register("mine")(define())

    @dataclass(frozen=True)
    class Other(SVD):
        pass

    with pytest.raises(
        PareError, match=r"the method name 'mine' is taken by .*test_registry\.define.*Mine\. .*another"
    ):
        registry.register("mine")(Other)
    assert registry.get("mine") is first


@pytest.mark.parametrize("taken", [METHODS, MASKS, UPDATES, ALLOCATIONS])
def test_the_names_of_the_package_are_taken_for_everybody_else(taken):
    before = taken.classes()

    @dataclass(frozen=True)
    class Ours(*next(iter(before.values())).__mro__[1:2]):
        needs = frozenset()
        choose = apply = None

    shipped = [name for name, cls in before.items() if cls.__module__.startswith("paredown.")]
    for name in shipped:  # other tests may have registered classes of their own
        with pytest.raises(PareError, match=f"the {taken.what} name '{name}' is taken by paredown"):
            taken.register(name)(Ours)
    assert shipped and taken.classes() == before


def test_the_same_class_defined_again_takes_the_place_of_the_first(registry):
    registry.register("mine")(define(1.0))
    assert registry.build("mine", {}).size == 1.0
    again = registry.register("mine")(define(2.0))
    assert registry.get("mine") is again and registry.build("mine", {}).size == 2.0


def test_what_registers_after_lookups_is_known_too(registry):
    with pytest.raises(PareError, match=r"unknown method 'mine'\. Known"):
        registry.get("mine")
    assert registry.classes() == {}
    mine = registry.register("mine")(define())
    assert registry.classes() == {"mine": mine}
    with pytest.raises(PareError, match=r"unknown method 'mime'\. Did you mean 'mine'\?"):
        registry.build("mime", {})


def test_all_files_of_a_package_are_imported_when_a_name_is_first_looked_up(tmp_path, monkeypatch):
    folder = tmp_path / "shelf_of_things" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text(
        "from paredown.compress.registry import Registry\nTHINGS = Registry('thing', __name__)\n"
    )
    (folder / "__init__.py").touch()
    (folder / "one.py").write_text(
        "from dataclasses import dataclass\nfrom shelf_of_things import THINGS\n"
        "@THINGS.register('one')\n@dataclass(frozen=True)\nclass One:\n    number: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    things = __import__("shelf_of_things").THINGS
    try:
        assert "shelf_of_things.inner.one" not in sys.modules
        assert things.build("one", {"number": 3}).number == 3 and list(things.classes()) == ["one"]
    finally:
        for name in [name for name in sys.modules if name.startswith("shelf_of_things")]:
            del sys.modules[name]


def test_a_file_that_cannot_be_imported_fails_every_lookup_and_not_the_first_alone(tmp_path, monkeypatch):
    (tmp_path / "broken_shelf").mkdir()
    (tmp_path / "broken_shelf" / "__init__.py").write_text("")
    (tmp_path / "broken_shelf" / "one.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    things = Registry("thing", "broken_shelf")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_module_anywhere"):
            things.classes()


@pytest.mark.parametrize("needs", [frozenset({"gramm"}), {Need.MEAN, "gramm"}])
def test_a_misspelt_need_is_refused_when_the_class_registers(registry, needs):
    with pytest.raises(
        PareError, match=r"mine needs the statistic 'gramm', which is not collected\. Did you mean 'gram'\?"
    ):
        registry.register("mine")(define(needs=needs))
    for parts, member in ((MASKS, "choose"), (UPDATES, "apply")):
        cls = define(needs=needs, **{member: None})
        with pytest.raises(PareError, match="part needs the statistic 'gramm'"):
            parts.register("part")(cls)
        assert "part" not in parts.classes()
    assert registry.classes() == {}


def test_a_misspelt_need_that_depends_on_options_is_refused_when_the_method_is_built(registry):
    needs = property(lambda self: frozenset({Need.GRAM} if self.size < 2 else {"menn"}))
    registry.register("mine")(define(needs=needs))
    assert registry.build("mine", {}).needs == {"gram"}
    with pytest.raises(PareError, match=r"mine needs the statistic 'menn', .*Did you mean 'mean'\?"):
        registry.build("mine", {"size": 3})


@pytest.mark.parametrize("needs", ["gram", ["gram"], (Need.GRAM,)])
def test_needs_that_are_no_set_are_refused(registry, needs):
    with pytest.raises(
        PareError, match=r"mine: `needs` must be a set of statistics, such as frozenset\({Need\.GRAM}\)"
    ):
        registry.register("mine")(define(needs=needs))


def test_a_class_that_is_no_dataclass_is_refused(registry):
    class Plain(WeightMethod):
        pass

    class Heir(SVD):  # its options would be those of SVD, without `more`
        more: float = 1.0

    for cls in (Plain, Heir):
        with pytest.raises(
            PareError, match=rf"method 'mine': .*{cls.__name__} is no dataclass\. Add @dataclass\(frozen"
        ):
            registry.register("mine")(cls)


def test_a_class_that_is_no_method_mask_update_or_allocation_is_refused(registry):
    @dataclass(frozen=True)
    class Anything:
        needs = frozenset()

    with pytest.raises(PareError, match=r"mine: .*Anything is no method\. Derive it from WeightMethod, GroupMethod, "):
        registry.register("mine")(Anything)
    with pytest.raises(PareError, match=r"mine: .*Anything has no choose"):
        MASKS.register("mine")(Anything)
    with pytest.raises(PareError, match=r"mine: .*Anything has no apply"):
        UPDATES.register("mine")(Anything)
    with pytest.raises(PareError, match=r"mine: .*Anything is no allocation\. Derive it from Allocation"):
        ALLOCATIONS.register("mine")(Anything)

    @dataclass(frozen=True)
    class Halves(GroupMethod):
        def compress(self, group, stats):
            return None

    assert registry.register("mine")(Halves) is Halves


def test_a_decorator_gives_the_class_back_and_its_fields_are_the_options(registry):
    mine = define()
    assert registry.register("mine")(mine) is mine and register.__func__ is Registry.register
    with pytest.raises(PareError, match=r"(?s)mine has no option 'sise'\. Did you mean 'size'\?.*mine.size: 'much'"):
        registry.build("mine", {"sise": 1, "size": "much"})


@dataclass(frozen=True)
class Stripes:
    """A mask with options of its own, one of them required."""

    width: int
    offset: int = 0

    needs = frozenset({Need.MEAN})

    def choose(self, weight, stats, sparsity):
        columns = (torch.arange(weight.shape[1]) + self.offset) // self.width % 2 == 0
        return fixed_mask(columns.expand(weight.shape))


@pytest.fixture(scope="module")
def stripes():
    MASKS.register("stripes_of_tests")(Stripes)
    return "stripes_of_tests"


def test_masked_takes_the_options_of_its_mask_and_of_its_update_beside_its_own(stripes):
    method = build("masked", {"mask": stripes, "width": 2, "offset": 1, "damping": 0.1, "sparsity": 0.5})
    mask, update = method.pair()
    assert mask == Stripes(2, 1) and update.damping == 0.1 and method.needs == {"mean", "gram"}
    assert build("masked", {"mask": stripes, "width": 2, "update": "none"}).needs == {"mean"}
    both = build("masked", {"mask": "sparsegpt", "damping": 0.2}).pair()
    assert [part.damping for part in both] == [0.2, 0.2]
    weight = torch.ones(3, 8)
    edit = build("masked", {"mask": stripes, "width": 2, "offset": 1, "update": "none"}).compress(weight, None)
    assert edit.keep[0].int().tolist() == [1, 0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widht": 2}, r"masked has no option 'widht'\. Did you mean 'width'\?"),
        ({"width": 2, "dampign": 0.1}, r"masked has no option 'dampign'\. Did you mean 'damping'\?"),
        ({"width": 2, "sparsty": 0.1}, r"masked has no option 'sparsty'\. Did you mean 'sparsity'\?"),
        ({"width": 2, "damping": 0.1, "update": "none"}, r"masked has no option 'damping'"),
        ({"width": 2, "further": {}}, r"masked has no option 'further'"),
        ({}, r"masked needs the option 'width'"),
        ({"width": "wide"}, r"masked\.width: 'wide': .*integer"),
        ({"width": 2, "damping": -1}, r"masked\.damping: -1: .*greater than or equal to 0"),
        ({"width": 2, "update": "sparsgpt"}, r"masked\.update: unknown update 'sparsgpt'\. Did you mean 'sparsegpt'\?"),
        ({"mask": "wnada"}, r"masked\.mask: unknown mask 'wnada'\. Did you mean 'wanda'\?"),
    ],
)
def test_options_of_masked_that_are_wrong_are_refused_with_suggestions(options, message, stripes):
    with pytest.raises(PareError, match=message):
        build("masked", {"mask": stripes, **options})


def test_all_faults_of_masked_are_told_at_once_and_each_once(stripes):
    with pytest.raises(PareError) as fault:
        build("masked", {"mask": "sparsegpt", "damping": -1, "sparsity": 1.5, "offst": 3})
    lines = str(fault.value).splitlines()
    assert len(lines) == 3
    assert [line.split()[0] for line in lines] == ["masked", "masked.sparsity:", "masked.damping:"]


def test_where_the_mask_is_misspelt_no_option_of_its_own_is_blamed(stripes):
    with pytest.raises(PareError) as fault:
        build("masked", {"mask": stripes + "x", "width": 2})
    assert "Did you mean 'stripes_of_tests'?" in str(fault.value) and "width" not in str(fault.value)
