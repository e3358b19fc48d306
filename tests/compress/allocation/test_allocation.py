"""One budget for all layers: the greedy walk on hulls against the exact program, and the rules by shape against sums."""

import math
import random
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch

from paredown.compress.allocation.base import Budget, Layer
from paredown.compress.allocation.by_share import PerType
from paredown.compress.allocation.global_loss import Global, hull, points
from paredown.compress.allocation.sensitivity import Sensitivity
from paredown.compress.allocation.spec import AllocationSpec
from paredown.compress.allocation.theoretical_loss import TheoreticalLoss
from paredown.compress.errors import PareError
from paredown.compress.methods import Choice, build
from paredown.compress.numerics.factorize import cost, largest_rank, rank_step
from paredown.compress.numerics.moments import InputStats, Stats
from paredown.compress.recipe import Recipe

SEEDS = range(12)
TOKENS = 4096  # of the calibration
# the kind of storage, whether it has a bias, and a method that stores so
KINDS = {
    "factors": ("lowrank", False, ("svd", {})),
    "factors and bias": ("lowrank", True, ("rom", {})),
    "pifa": ("pifa", False, ("svd", {"storage": "pifa"})),
    "pifa and bias": ("pifa", True, ("rom", {"storage": "pifa"})),
    "cur": ("cur", False, ("cur", {})),
}


@dataclass(frozen=True)
class Curve:
    """One layer: its shape, and what it loses with each component that is left out, largest first."""

    name: str
    shape: tuple[int, int]
    losses: tuple[float, ...] = ()

    @property
    def size(self):
        return self.shape[0] * self.shape[1]

    def loss(self, rank):
        """Predicted loss at a rank; None is the dense weight."""
        return 0.0 if rank is None else math.fsum(self.losses[rank:])

    def layer(self, kind):
        """As allocations see it: nothing at all, then each rank of whole steps that stores less than the dense weight."""
        paid = costs(kind)
        ranks = range(rank_step(self.shape), min(self.shape) + 1, rank_step(self.shape))
        paying = [Choice(n, self.loss(rank), rank) for rank in ranks if (n := paid(self.shape, rank)) < self.size]
        return Layer(self.name, self.size, [Choice(0, self.loss(0), None), *paying])


def layers_of(curves, kind):
    return [c.layer(kind) for c in curves]


def costs(kind):
    name, bias, _ = KINDS[kind]
    return lambda shape, rank: cost(name, shape, rank, bias)


def by_global_loss(curves, numbers, kind):
    # half a number more, so that what is counted down to a whole one is `numbers` whatever the rounding
    return Global().allocate(Budget(layers_of(curves, kind), (numbers + 0.5) / sum(c.size for c in curves)))


def by_share(curves, kept, weights, kind):
    return PerType(weights).allocate(Budget(layers_of(curves, kind), kept))


def by_theoretical_loss(curves, kept, kind, tokens=TOKENS):
    return TheoreticalLoss().allocate(Budget(layers_of(curves, kind), kept, tokens))


def by_sensitivity(curves, losses, kept, kind):
    return Sensitivity().allocate(Budget(layers_of(curves, kind), kept, sensitivities=losses))


def by_dynamic_program(curves, numbers, kind):
    """The least possible sum of predicted losses, exactly."""
    best = [0.0] * (numbers + 1)
    for layer in layers_of(curves, kind):
        options = points(layer)
        best = [
            min((best[room - o.numbers] + o.loss for o in options if o.numbers <= room), default=math.inf)
            for room in range(numbers + 1)
        ]
    return best[numbers]


def problem(seed, layers=5, smallest=3, largest_side=9):
    """Layers of random shapes; losses that fall fast or slowly, with ties and zeros among them."""
    draw = random.Random(seed)
    curves = []
    for i in range(layers):
        shape = draw.randint(smallest, largest_side), draw.randint(smallest, largest_side)
        decay, scale = draw.uniform(0.3, 1.0), draw.choice([0.1, 1.0, 10.0])
        losses = sorted((scale * decay**k * draw.uniform(0.5, 1.0) for k in range(min(shape))), reverse=True)
        if i == 1:
            losses = [scale] * len(losses)  # no rank is better than another: only the dense weight's kink counts
        if i == 2:
            losses[-1] = 0.0  # a layer that has not full rank
        curves.append(Curve(f"model.layers.{i}.{draw.choice(['q_proj', 'v_proj'])}", shape, tuple(losses)))
    return curves


def spent(curves, ranks, paid):
    return sum(c.size if ranks[c.name] is None else paid(c.shape, ranks[c.name]) for c in curves)


def lost(curves, ranks):
    return sum(c.loss(ranks[c.name]) for c in curves)


def budgets(curves, paid):
    least = sum(paid(c.shape, 1) if paid(c.shape, 1) < c.size else c.size for c in curves)
    return range(least, sum(c.size for c in curves) + 1)


def steps(curves, kind):
    """(slope, numbers, loss saved) of every step on every layer's hull, steepest first."""
    found = []
    for layer in layers_of(curves, kind):
        for a, b in pairwise(hull(points(layer))):
            more = b.numbers - a.numbers
            found.append(((b.loss - a.loss) / more, more, a.loss - b.loss))
    return sorted(found)


@pytest.mark.parametrize("kind", KINDS)
def test_points_are_every_rank_that_pays_and_the_dense_weight(kind):
    paid, (name, options) = costs(kind), KINDS[kind][2]
    method = build(name, options)
    for curve in problem(0):
        out, inner = curve.shape
        draw = torch.Generator().manual_seed(out)
        left, right = (torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0] for n in curve.shape)
        # of inputs that are alike, what is lost are the squared singular values
        squares = torch.zeros(out, inner, dtype=torch.float64)
        squares.diagonal().copy_(torch.tensor(curve.losses, dtype=torch.float64))
        weight, stats = left @ squares.sqrt() @ right, Stats(InputStats.uniform(inner, method.needs))
        choices = method.choices(curve.shape, weight, stats)
        found = points(Layer(curve.name, curve.size, choices))
        worth = [r for r in range(1, min(curve.shape) + 1) if paid(curve.shape, r) < curve.size]
        assert [p.option for p in found] == [*worth, None] and found[-1] == Choice(curve.size, 0.0, None)
        for point in found[:-1]:
            assert point.numbers == paid(curve.shape, point.option)
            assert point.loss == pytest.approx(sum(curve.losses[point.option :]), abs=1e-12)
        assert choices[0].option is None and choices[0].loss == pytest.approx(sum(curve.losses))
        for mine, wanted in zip(choices, curve.layer(kind).choices, strict=True):
            assert mine == Choice(wanted.numbers, pytest.approx(wanted.loss, abs=1e-12), wanted.option)
        assert [c.option for c in method.choices(curve.shape)] == [c.option for c in choices]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_hull_is_what_no_chord_lies_below(seed):
    draw = random.Random(seed)
    numbers = sorted(draw.sample(range(1, 200), draw.randint(1, 25)))
    found = [Choice(n, round(draw.uniform(0, 9), draw.choice([0, 6])), i) for i, n in enumerate(numbers)]

    def above(p, a, b):
        """Whether p lies between two others, on their chord or above it."""
        whole, left, right = b.numbers - a.numbers, p.numbers - a.numbers, b.numbers - p.numbers
        return left > 0 and right > 0 and p.loss * whole >= a.loss * right + b.loss * left - 1e-9

    wanted = [p for p in found if not any(above(p, a, b) for a in found for b in found)]
    assert hull(found) == wanted
    slopes = [(b.loss - a.loss) / (b.numbers - a.numbers) for a, b in pairwise(wanted)]
    assert slopes == sorted(slopes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_global_split_is_optimal_where_a_step_ends_and_within_one_step_elsewhere(seed, kind):
    curves, paid = problem(seed), costs(kind)
    walk, first = steps(curves, kind), budgets(curves, paid)[0]
    ends = {first}
    for _, numbers, _ in walk:
        ends.add(max(ends) + numbers)
    assert max(ends) == sum(c.size for c in curves)
    for budget in {*ends, *budgets(curves, paid)[:: max(1, len(budgets(curves, paid)) // 12)]}:
        ranks = by_global_loss(curves, budget, kind)
        assert ranks.keys() == {c.name for c in curves} and spent(curves, ranks, paid) <= budget
        best, mine = by_dynamic_program(curves, budget, kind), lost(curves, ranks)
        assert mine >= best - 1e-9
        room, missed = budget - first, 0.0  # what the first step that does not fit would have saved
        for _, numbers, saved in walk:
            if numbers > room:
                missed = saved
                break
            room -= numbers
        assert mine - best <= (0.0 if budget in ends else missed) + 1e-9


def test_the_dynamic_program_is_exhaustive_search():
    curves, paid = problem(3, layers=3, largest_side=6), costs("factors")
    tables = [points(layer) for layer in layers_of(curves, "factors")]
    for budget in budgets(curves, paid):
        fits = [combined for combined in product(*tables) if sum(point.numbers for point in combined) <= budget]
        best = min((sum(point.loss for point in combined) for combined in fits), default=math.inf)
        assert by_dynamic_program(curves, budget, "factors") == pytest.approx(best, abs=1e-9)
    assert by_dynamic_program(curves, budgets(curves, paid)[0] - 1, "factors") == math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_more_budget_never_loses_more(seed, kind):
    curves, paid = problem(seed), costs(kind)
    found = [lost(curves, by_global_loss(curves, b, kind)) for b in budgets(curves, paid)]
    assert all(b <= a + 1e-9 for a, b in pairwise(found)) and found[-1] == pytest.approx(0, abs=1e-9)
    assert set(by_global_loss(curves, budgets(curves, paid)[-1], kind).values()) == {None}  # everything stays dense


def test_a_layer_whose_last_ranks_are_dear_jumps_to_dense():
    """Factors of a square matrix stop paying at half its rank: what the other half is worth comes in one step."""
    even, steep = Curve("even", (8, 8), [1.0] * 8), Curve("steep", (8, 8), [1e-3 * 0.5**k for k in range(8)])
    kind = "factors"
    # 0.146 a number in one go, 0.0625 rank by rank
    assert hull(points(even.layer(kind))) == [Choice(16, 7.0, 1), Choice(64, 0.0, None)]
    found = by_global_loss([even, steep], 64 + 16, kind)
    assert found == {"even": None, "steep": 1}
    assert lost([even, steep], found) == pytest.approx(by_dynamic_program([even, steep], 80, kind))
    # one number short: the jump does not fit, and what is left goes to the other layer
    assert by_global_loss([even, steep], 64 + 15, kind) == {"even": 1, "steep": 3}


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_below_rank_one_everywhere_is_refused(kind):
    curves, paid = problem(1), costs(kind)
    least = budgets(curves, paid)[0]
    assert spent(curves, by_global_loss(curves, least, kind), paid) == least
    with pytest.raises(
        PareError, match=f"rank 1 in every layer takes {least:,} parameters, and {least - 1:,}.*raise kept"
    ):
        by_global_loss(curves, least - 1, kind)


def shapes(seed, layers=12):
    draw = random.Random(seed)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    return [
        Curve(f"layers.{i}.{draw.choice(names)}", (draw.randint(150, 400), draw.randint(150, 400)))
        for i in range(layers)
    ]


def poured(curves, weights, budget):
    """Shares min(1, weight * level) of each size, the level found by bisection."""
    low, high = 0.0, 1e6
    for _ in range(200):
        level = (low + high) / 2
        low, high = (
            (level, high)
            if sum(min(1.0, w * level) * c.size for c, w in zip(curves, weights, strict=True)) < budget
            else (low, level)
        )
    return [min(1.0, w * low) for w in weights]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0.25, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("values", [1.0, 3.0, 12.0])
def test_shares_spend_the_budget_and_no_more(values, kept, kind):
    paid, full = costs(kind), 0
    for seed in range(4):
        curves = shapes(seed)
        ranks = by_share(curves, kept, {"[vo]_proj": values, "q_*": 0.75}, kind)
        budget = kept * sum(c.size for c in curves)
        assert 0.8 * budget < spent(curves, ranks, paid) <= budget + 1e-6
        of_layer = [values if c.name[-6] in "vo" else 0.75 if c.name[-6] == "q" else 1.0 for c in curves]
        for c, share in zip(curves, poured(curves, of_layer, budget), strict=True):
            rank = ranks[c.name]
            if share > 1 - 1e-9:
                assert rank is None
                full += 1
            else:  # the largest rank that its share affords
                assert paid(c.shape, rank) <= share * c.size + 1e-6
                assert rank == min(c.shape) or paid(c.shape, rank + 1) > share * c.size - 1e-6
    assert full > 0 or values * kept < 1


def test_equal_weights_give_everyone_the_uniform_rank():
    curves = [Curve(f"layers.{i}.q_proj", (60, 40 + 8 * i)) for i in range(6)]
    for kept in (0.25, 0.5, 0.75):
        ranks = by_share(curves, kept, {}, "factors")
        for c in curves:
            assert ranks[c.name] == max(r for r in range(1, 41) if r * sum(c.shape) <= kept * c.size)


def test_weights_are_the_ratio_of_shares():
    """LoRAP's 3 : 1 for values and outputs against queries and keys, on equal shapes."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    curves = [Curve(f"layers.{i}.self_attn.{n}", (64, 64)) for i in range(3) for n in names]
    ranks = by_share(curves, 0.25, {"v_proj": 3.0, "o_proj": 3.0}, "factors")
    of = {n: {ranks[c.name] for c in curves if c.name.endswith(n)} for n in names}
    # a quarter of 64 * 64 is 1024 numbers a layer; shares of 1/8 and 3/8, each rank costs 128
    assert of == {"q_proj": {4}, "k_proj": {4}, "v_proj": {12}, "o_proj": {12}}


def test_what_a_full_layer_cannot_use_goes_to_the_rest():
    heavy, light = Curve("heavy", (40, 40)), [Curve(f"light{i}", (40, 40)) for i in range(3)]
    curves = [heavy, *light]
    ranks = by_share(curves, 0.5, {"heavy": 50.0}, "factors")
    # half of four layers is two; one of them is the heavy one whole, and the other three share what is left
    assert ranks["heavy"] is None
    assert {ranks[c.name] for c in light} == {max(r for r in range(1, 41) if r * 80 <= 1600 / 3)}


def theoretical(names=("q_proj", "down_proj"), layers=6, seed=0):
    draw = random.Random(seed)
    curves = []
    for name in names:
        shape = (48, 48) if name == "q_proj" else (48, 80)
        for i in range(layers):
            scale = 10 ** draw.uniform(-2, 2)
            curves.append(Curve(f"layers.{i}.{name}", shape, [scale * 0.9**k for k in range(48)]))
    return curves


def test_of_the_layer_that_loses_least_a_twentieth_stays_beside_what_the_others_want():
    curves = [Curve(f"layers.{i}.q_proj", (480, 480), [scale] * 480) for i, scale in enumerate((1e-9, 1e30))]
    ranks = by_theoretical_loss(curves, 0.3, "factors")
    norm = math.sqrt(TOKENS * (480 - ranks_at(0.3)) * 1e30)
    removed = [2 * 0.7 * s / (1 + 1 / math.log(norm)) for s in (1, 1 / math.log(norm))]
    assert removed[0] > 1  # more than there is
    wanted = (0.05, 1 - removed[1])
    assert list(ranks.values()) == [ranks_at(w * 0.6 / sum(wanted)) for w in wanted]


def ranks_at(share):
    return max(k for k in range(1, 481) if k * 960 <= share * 480 * 480)


@pytest.mark.parametrize("kind", ["factors", "pifa"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.8])
def test_theoretical_loss_removes_less_where_more_is_lost_and_keeps_each_types_total(kept, kind):
    curves, paid = theoretical(), costs(kind)
    ranks = by_theoretical_loss(curves, kept, kind)
    kinds = {c.name.rpartition(".")[2] for c in curves}
    for type_ in kinds:
        members = sorted((c for c in curves if c.name.endswith(type_)), key=lambda c: c.losses[0])
        stored = [c.size if ranks[c.name] is None else paid(c.shape, ranks[c.name]) for c in members]
        assert stored == sorted(stored) and stored[0] < stored[-1]
        budget = kept * sum(c.size for c in members)
        assert budget - len(members) * sum(members[0].shape) < sum(stored) <= budget + 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_below_rank_one_is_refused_by_the_name_of_the_layer(kind):
    paid, curves = costs(kind), [Curve("enough", (20, 30)), Curve("less", (20, 30))]
    least = paid((20, 30), 1) / 600
    assert by_share(curves, least * 1.01, {}, kind) == {"enough": 1, "less": 1}
    with pytest.raises(PareError, match=r"less: not even rank 1 fits into .* of it: raise kept, or skip the layer"):
        by_share(curves, least, {"less": 0.999}, kind)
    with pytest.raises(PareError, match="q_proj: not even rank 1 fits"):  # of some layers a twentieth is to stay
        by_theoretical_loss(theoretical(("q_proj",)), paid((48, 48), 1) / 48**2, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_keeps_all_of_itself_stays_dense_however_narrow(kind):
    """Of a single row no rank pays: with its whole size to spend, it needs none."""
    curves = [Curve("gate", (1, 64)), Curve("rest", (64, 64))]
    ranks = by_share(curves, 0.5, {"gate": 100.0}, kind)
    assert ranks["gate"] is None and ranks["rest"] >= 1
    measured = {"rest": {0.4: 2.0}}  # of the gate nothing could be measured
    assert by_sensitivity(curves, measured, 0.6, kind)["gate"] is None
    with pytest.raises(PareError, match="gate: not even rank 1"):
        by_share(curves, 0.5, {}, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_sensitivities_give_each_layer_its_least_share_below_the_lowest_threshold_that_fits(seed, kind):
    draw, paid = random.Random(seed), costs(kind)
    curves = shapes(seed, layers=6)
    shares = (0.2, 0.4, 0.6, 0.8)
    # more kept may well lose more: what is measured is noisy
    losses = {c.name: {s: round(draw.uniform(2, 3) - s, 2) for s in shares} for c in curves}
    budget, fits = 0.6 * sum(c.size for c in curves), {}
    for threshold in {loss for found in losses.values() for loss in found.values()}:
        ranks = {}
        for c in curves:
            below = [s for s in shares if losses[c.name][s] <= threshold]
            affordable = [k for k in range(1, min(c.shape) + 1) if below and paid(c.shape, k) <= below[0] * c.size]
            ranks[c.name] = max(affordable) if below else None
        if spent(curves, ranks, paid) <= budget:
            fits[threshold] = ranks
    found = by_sensitivity(curves, losses, 0.6, kind)
    assert found == fits[min(fits)] and spent(curves, found, paid) <= budget
    with pytest.raises(PareError, match=r"no measured share of the layers leaves only 0\.1 of them"):
        by_sensitivity(curves, losses, 0.1, kind)


def test_theoretical_loss_is_the_papers_formula_where_nothing_is_capped():
    """Removed shares are proportional to 1 / log(norm of all tokens' errors at the common ratio) within a type."""
    curves, kept = theoretical(names=("q_proj",), layers=4), 0.6
    ranks = by_theoretical_loss(curves, kept, "factors")
    rank = max(r for r in range(1, 49) if r * 96 <= kept * 48 * 48)
    scores = [1 / math.log(math.sqrt(TOKENS * sum(c.losses[rank:]))) for c in curves]
    assert max(scores) < 1
    for c, score in zip(curves, scores, strict=True):
        share = 1 - (1 - kept) * len(curves) * score / sum(scores)
        assert 0 < share < 1 and ranks[c.name] == int(share * c.size / 96 + 1e-9)


@pytest.mark.parametrize("kind", ["factors", "pifa"])
def test_theoretical_loss_treats_equal_layers_alike(kind):
    curves = [Curve(f"layers.{i}.q_proj", (40, 60), [0.8**k for k in range(40)]) for i in range(5)]
    ranks = by_theoretical_loss(curves, 0.5, kind)
    assert len(set(ranks.values())) == 1


def test_losses_that_no_logarithm_ranks_count_alike():
    """Where the norm of all errors is below e the logarithm is taken as 1: nothing is divided by zero or less."""
    curves = [Curve(f"layers.{i}.q_proj", (48, 48), [10.0**-i * 0.9**k for k in range(48)]) for i in range(4)]
    for tokens, count in ((1e-9, 1), (TOKENS, 4)):
        assert len(set(by_theoretical_loss(curves, 0.6, "factors", tokens).values())) == count
    nothing = [Curve(f"layers.{i}.q_proj", (48, 48), [0.0] * 48) for i in range(4)]
    assert len(set(by_theoretical_loss(nothing, 0.6, "factors").values())) == 1


def test_recipes_say_how_ranks_are_spread():
    spec = Recipe.parse(
        {"method": "svd_llm", "allocation": {"strategy": "per_type", "weights": {"v_proj": 3}}}
    ).allocation
    assert spec == AllocationSpec(strategy="per_type", weights={"v_proj": 3.0})
    assert Recipe.parse({"method": "svd_llm"}).allocation is None


@pytest.mark.parametrize(
    ("allocation", "told"),
    [
        ({"strategy": "gobal"}, r"unknown allocation 'gobal'\. Did you mean 'global'\? .*per_type.*uniform"),
        ({"strategy": "global", "weigths": {}}, r"global has no option 'weigths'\.$"),
        ({"strategy": "per_type", "weigths": {}}, r"per_type has no option 'weigths'\. Did you mean 'weights'\?"),
        ({"weights": {}}, r"allocation.strategy: this key is required"),
        ({"strategy": "per_type", "weights": {"v_proj": 0}}, r"per_type\.weights\.v_proj: 0: .*greater than 0"),
        ({"strategy": "per_type", "weights": {"v_proj": "much"}}, r"per_type\.weights\.v_proj: 'much': .*number"),
        ("global", r"allocation: .*found 'global'"),
        (["global"], r"allocation: .*found \['global'\]"),
    ],
)
def test_faults_of_the_allocation_are_told_with_their_path(allocation, told):
    with pytest.raises(PareError, match=told):
        Recipe.parse({"method": "svd_llm", "allocation": allocation}, "mine")


@pytest.mark.parametrize(("kind", "storage"), [("lowrank", "factors"), ("pifa", "pifa")], ids=["lowrank", "pifa"])
def test_large_weights_get_ranks_that_kernels_load_in_whole_vectors(kind, storage):
    large, small = (1024, 2048), (256, 2048)
    assert rank_step(large) == 16 and rank_step(small) == 1
    for share in (0.31, 0.5, 0.77):
        rank = largest_rank(kind, large, share * 1024 * 2048)
        assert rank % 16 == 0
        assert cost(kind, large, rank) <= share * 1024 * 2048 < cost(kind, large, rank + 16)
    curves = [Curve(str(i), large, [2.0 ** (-j / (40 + 9 * i)) for j in range(1024)]) for i in range(4)]
    curves.append(Curve("small", small, [2.0 ** (-j / 30) for j in range(256)]))
    budget = sum(c.size for c in curves) // 2
    ranks = by_global_loss(curves, budget, storage)
    assert all(ranks[c.name] % 16 == 0 for c in curves[:4] if ranks[c.name]) and ranks["small"] % 16
    assert budget - 16 * 3072 < spent(curves, ranks, costs(storage)) <= budget


def test_energy_of_a_large_weight_is_rounded_up_to_a_whole_step():
    losses = torch.logspace(0, -4, 512, dtype=torch.float64)
    exact = int((losses.cumsum(0) < 0.85 * losses.sum()).sum()) + 1
    assert exact % 16
    weight = torch.zeros(512, 4096)
    weight.diagonal().copy_(losses.sqrt())
    edit = build("svd", {"energy": 0.85, "storage": "factors"}).compress(weight, Stats(InputStats(4096, frozenset())))
    assert edit.rank == 16 * math.ceil(exact / 16)


@pytest.mark.parametrize("seed", range(5))
def test_part_of_the_way_back_every_layer_lies_between_its_own_and_the_common_share(seed):
    budget = Budget(layers_of(problem(seed, smallest=12, largest_side=30), "factors"), 0.7)
    taken = costs("factors")
    shapes = {c.name: c.shape for c in problem(seed, smallest=12, largest_side=30)}

    def shares(shrink):
        options = Global(shrink).allocate(budget)
        sizes = {name: a * b for name, (a, b) in shapes.items()}
        return {n: 1.0 if r is None else taken(shapes[n], r) / sizes[n] for n, r in options.items()}

    own, half, equal = shares(0.0), shares(0.5), shares(1.0)
    for layer in budget.layers:
        step = sum(shapes[layer.name]) / layer.size  # of one rank
        low, high = sorted((own[layer.name], budget.kept))
        assert low - step <= half[layer.name] <= high + 1e-9
        assert abs(half[layer.name] - (own[layer.name] + budget.kept) / 2) <= step + 1e-9
        assert budget.kept - step <= equal[layer.name] <= budget.kept + 1e-9
    assert own != half
