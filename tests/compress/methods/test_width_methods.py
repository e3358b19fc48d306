"""Methods that take columns from a reader: scores against slow loops of their formulas, and what each hands back."""

from dataclasses import dataclass, replace

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS, build
from paredown.compress.methods.base import Group, Part, Units
from paredown.compress.methods.structured.width import Scored
from paredown.compress.numerics.moments import INPUT_NEEDS, InputStats, Need, Stats
from paredown.compress.numerics.units import obs_order
from paredown.compress.survey.gradients import moments

WINDOWS, TOKENS = 6, 20
SCORED = ["minitron", "flap", "wanda_sp", "taylor", "two_ssp_width", "random"]
ALL = [*SCORED, "paredown_width"]
widths = pytest.mark.parametrize("width", [1, 3])
methods = pytest.mark.parametrize("name", ALL)


@dataclass
class Case:
    """A reader (out, units * width), its inputs by window, and the gradients at its output."""

    units: int
    width: int
    out: int
    weight: torch.Tensor
    x: torch.Tensor  # (windows, tokens, units * width)
    delta: torch.Tensor  # (windows, tokens, out)

    @property
    def tokens(self):
        return self.x.flatten(0, 1).double()

    def given(self, method):
        """What the pipeline hands to the method: the statistics that it asks for, and no others."""
        stats = InputStats(self.x.shape[-1], method.needs & INPUT_NEEDS)
        for part in self.x.split([1, 3, 2]):
            stats.update(part)
        x, delta = self.x.flatten(0, 1), self.delta.flatten(0, 1)
        sums = dict(moments(method.needs, self.weight, x, delta, WINDOWS))
        group = Group(
            "model.layers.0.mlp", "channels", self.units, (), "model.layers.0.mlp.down_proj", "intermediate_size"
        )
        gradients = {need: total / len(x) for need, total in sums.items()}
        return Units(group, self.weight, {}, Stats(stats, gradients))

    def cut(self, name, keep, **options):
        method = build(name, {"units": keep, "multiple": 1, **options})
        return method.compress(self.given(method), keep)

    def columns(self, sliced):
        return sliced.keep.repeat_interleave(self.width)

    def loss(self, sliced):
        """Mean square of what the output loses."""
        keep, kept = self.columns(sliced), sliced.weight
        kept = self.weight[:, keep] if kept is None else kept
        lost = self.tokens @ self.weight.double().T - self.tokens[:, keep] @ kept.double().T
        if sliced.shift is not None:
            lost = lost - sliced.shift
        return float(lost.square().sum(1).mean())


def case(width=1, units=12, out=7, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    inner = units * width
    x = torch.randn(WINDOWS, TOKENS, inner, generator=draw) @ torch.randn(inner, inner, generator=draw)
    x = x * torch.rand(inner, generator=draw) + torch.randn(inner, generator=draw)
    weight = torch.randn(out, inner, generator=draw).to(dtype)
    delta = torch.randn(WINDOWS, TOKENS, out, generator=draw) * torch.rand(out, generator=draw)
    return Case(units, width, out, weight, x, delta)


def minitron(c, j):
    return sum(sum(abs(float(t[j])) / TOKENS for t in window) ** 2 for window in c.x) ** 0.5


def two_ssp_width(c, j):
    return sum(sum(float(t[j]) ** 2 for t in window) ** 0.5 for window in c.x) / WINDOWS


def flap(c, j):
    values = [float(t[j]) for t in c.tokens]
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) * sum(float(w) ** 2 for w in c.weight[:, j])


def wanda_sp(c, j):
    norm = (sum(float(t[j]) ** 2 for t in c.tokens) / len(c.tokens)) ** 0.5
    return sum(abs(float(w)) * norm for w in c.weight[:, j])


def weight_gradient(c, i, j):
    return sum(float(d[i]) * float(t[j]) for d, t in zip(c.delta.flatten(0, 1), c.tokens, strict=True))


def taylor(c, j):
    return sum(abs(float(c.weight[i, j]) * weight_gradient(c, i, j)) for i in range(c.out))


def taylor_vector(c, j):
    return abs(sum(float(c.weight[i, j]) * weight_gradient(c, i, j) for i in range(c.out)))


@widths
@pytest.mark.parametrize(
    ("name", "options", "score"),
    [
        ("minitron", {}, minitron), ("two_ssp_width", {}, two_ssp_width), ("flap", {}, flap), ("wanda_sp", {}, wanda_sp),
        ("taylor", {}, taylor), ("taylor", {"vector": True}, taylor_vector),
    ],
)  # fmt: skip
def test_the_units_with_the_highest_scores_of_the_formula_stay(name, options, score, width):
    c = case(width, units=9)
    scores = [sum(score(c, u * width + i) for i in range(width)) for u in range(c.units)]
    ranked = sorted(range(c.units), key=scores.__getitem__, reverse=True)
    for keep in range(1, c.units + 1):
        kept = c.cut(name, keep, **options).keep.nonzero()[:, 0].tolist()
        assert kept == sorted(ranked[:keep])


@methods
@widths
def test_as_many_units_stay_as_asked_and_the_rest_has_their_shapes(name, width):
    c = case(width, dtype=torch.bfloat16)
    for keep in (1, 5, 11, 12):
        for refit in (False, True):
            cut = c.cut(name, keep, refit=refit)
            assert cut.keep.dtype == torch.bool and cut.keep.shape == (12,) and int(cut.keep.sum()) == keep
            assert (cut.weight is None) == (not refit) and (cut.shift is not None) == (name == "flap")
            if cut.weight is not None:
                assert cut.weight.shape == (7, keep * width) and cut.weight.dtype == torch.bfloat16
            if cut.shift is not None:
                assert cut.shift.shape == (7,)


@methods
@widths
def test_a_refit_loses_less_on_the_same_units(name, width):
    c = case(width)
    for keep in (2, 6, 10):
        plain, fitted = c.cut(name, keep, refit=False), c.cut(name, keep, refit=True)
        assert torch.equal(plain.keep, fitted.keep) and c.loss(fitted) < c.loss(plain)


def test_the_bias_of_flap_holds_the_mean_of_the_output():
    c = case()
    whole = c.tokens.mean(0) @ c.weight.double().T
    for refit in (False, True):
        cut, bare = c.cut("flap", 5, refit=refit), c.cut("flap", 5, refit=refit, bias=False)
        kept = c.weight[:, cut.keep] if cut.weight is None else cut.weight
        torch.testing.assert_close(
            c.tokens.mean(0)[cut.keep] @ kept.double().T + cut.shift, whole, rtol=1e-5, atol=1e-5
        )
        assert bare.shift is None and c.loss(cut) < c.loss(bare)
    gone = ~c.cut("flap", 5).keep
    wanted = c.weight[:, gone].double() @ c.tokens.mean(0)[gone]
    torch.testing.assert_close(c.cut("flap", 5).shift, wanted, rtol=1e-5, atol=1e-5)


def test_a_refit_beside_a_bias_is_the_least_squares_fit_with_an_intercept():
    c = case()
    cut = c.cut("flap", 5, refit=True, damping=0.0)
    wide = torch.cat([c.tokens[:, cut.keep], torch.ones(len(c.tokens), 1).double()], 1)
    wanted = torch.linalg.lstsq(wide, c.tokens @ c.weight.double().T).solution.T
    torch.testing.assert_close(cut.weight.double(), wanted[:, :-1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(cut.shift, wanted[:, -1], rtol=1e-3, atol=1e-3)


@widths
@pytest.mark.parametrize("out", [5, 40])
def test_ours_goes_by_the_order_of_losses_in_the_damped_metric_of_both_sides(out, width):
    c = case(width, units=10, out=out)
    x, g = c.tokens, c.delta.flatten(0, 1).double()
    gram, half = x.T @ x / len(x), g.T @ g / len(g) / 2
    metric = (half + 0.5 * half.diagonal().mean() * torch.eye(out)) / 1.5
    wide = c.weight.double()
    form = metric if out <= wide.shape[1] else wide.T @ metric @ wide
    order, _ = obs_order(c.weight, gram, form, 0.01, width, stop=4)
    cut = c.cut("paredown_width", 4)
    assert (~cut.keep).nonzero()[:, 0].tolist() == sorted(order.tolist())


def test_ours_loses_less_in_its_metric_than_any_score_with_the_same_refit():
    for seed in range(3):
        c = case(units=24, out=9, seed=seed)
        losses = {name: c.loss(c.cut(name, 12, refit=True)) for name in ("minitron", "wanda_sp", "taylor", "random")}
        c.delta = torch.randn(c.delta.shape, generator=torch.Generator().manual_seed(seed))  # every output counts alike
        assert c.loss(c.cut("paredown_width", 12)) < min(losses.values())


def test_equal_scores_leave_the_first_units():
    @dataclass(frozen=True)
    class Alike(Scored):
        def scores(self, units):
            return torch.tensor([1.0, 2, 1, 1, 2, 1])

    method = Alike(units=4)
    assert method.compress(case(units=6).given(method), 4).keep.tolist() == [True, True, True, False, True, False]


def test_a_draw_depends_on_the_seed_and_the_group_and_on_nothing_else():
    c = case()
    first, again, other = (c.cut("random", 6, seed=seed).keep for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@methods
def test_a_method_reads_what_it_asks_for_and_a_gram_matrix_only_for_a_refit(name):
    plain, fitted = build(name, {"kept": 0.8, "refit": False}), build(name, {"kept": 0.8, "refit": True})
    assert Need.GRAM in fitted.needs and (Need.GRAM in plain.needs) == (name == "paredown_width")
    assert fitted.working_bytes((64, 256)) >= plain.working_bytes((64, 256)) > 0


@methods
def test_how_many_stay_is_said_once(name):
    with pytest.raises(PareError, match=r"how many units stay is not said: give kept, a share such as 0\.8, or units"):
        build(name, {})
    with pytest.raises(PareError, match=r"kept and units say .* in different ways: give one of them"):
        build(name, {"kept": 0.8, "units": 64})
    with pytest.raises(PareError, match=r"kept: 1\.5"):
        build(name, {"kept": 1.5})


@methods
@pytest.mark.parametrize("keep", [0, 13])
def test_more_units_than_there_are_cannot_stay_nor_none(name, keep):
    c, method = case(), build(name, {"units": 12, "multiple": 1})
    with pytest.raises(PareError, match=rf"model\.layers\.0\.mlp has 12 channels, of which {keep} cannot stay"):
        method.compress(c.given(method), keep)


def coupled(width, units=9, alike=3):
    """A gated MLP whose gate and up projections lie in one matrix; `alike` groups of units, each of units all but equal."""
    c, draw = case(width, units=units), torch.Generator().manual_seed(5)
    own = torch.arange(units) % alike
    rows = torch.randn(2, alike, width, 4, generator=draw)[:, own]
    rows += 1e-3 * torch.randn(rows.shape, generator=draw)
    columns = torch.randn(alike, width, c.out, generator=draw)[own]
    parts = (
        Part("mlp.gate_up_proj.weight", 0, width), Part("mlp.gate_up_proj.weight", 0, width, first=units * width),
        Part("mlp.down_proj.weight", 1, width), Part("mlp.gate_up_proj.bias", 0, width),
    )  # fmt: skip
    group = Group("mlp", "channels", units, parts, "mlp.down_proj", "intermediate_size")
    weight = columns.flatten(0, 1).T.contiguous()
    empty = Stats(InputStats(units * width, frozenset()))
    return Units(group, weight, {"mlp.gate_up_proj": rows.reshape(2 * units * width, 4)}, empty), own


@widths
def test_folding_makes_units_that_are_alike_one_with_the_sum_of_their_columns(width):
    units, own = coupled(width)
    cut = build("fold", {"units": 3, "multiple": 1}).compress(units, 3)
    assert cut.keep.tolist() == [True] * 3 + [False] * 6 and torch.equal(cut.into, own)
    columns = units.weight.unflatten(1, (9, width))
    wanted = torch.stack([columns[:, own == u].sum(1) for u in range(3)], 1).flatten(1)
    torch.testing.assert_close(cut.weight, wanted)


def test_folding_reads_the_readers_columns_too():
    units, own = coupled(1)
    other = (own + torch.arange(9) // 3) % 3  # rows alike within `own`, columns within `other`
    columns = 10 * torch.randn(3, 7, generator=torch.Generator().manual_seed(0))[other].T.contiguous()
    cut = build("fold", {"units": 3, "multiple": 1}).compress(replace(units, weight=columns), 3)
    assert torch.equal(cut.into[:, None] == cut.into, other[:, None] == other)


@pytest.mark.parametrize("keep", [1, 4, 9])
def test_folding_leaves_as_many_units_as_asked_and_at_the_full_number_all_as_they_were(keep):
    units, _ = coupled(2)
    method = build("fold", {"units": keep, "multiple": 1})
    cut = method.compress(units, keep)
    assert int(cut.keep.sum()) == keep and cut.weight.shape == (7, 2 * keep) and cut.keep[cut.into].all()
    if keep == 9:
        assert cut.into.tolist() == list(range(9)) and torch.equal(cut.weight, units.weight)
    with pytest.raises(PareError, match="mlp has 9 channels, of which 10 cannot stay"):
        method.compress(units, 10)


def test_every_width_method_is_tested_here():
    theirs = {name for name, cls in METHODS.classes().items() if issubclass(cls, Scored)}
    ours = {name for name in theirs if METHODS.get(name).__module__.startswith("paredown.")}
    assert ours == {*SCORED, "lorap_mlp"}  # which reads more of a block: see run/test_lorap.py


def test_a_head_is_scored_by_the_norm_of_its_output_and_a_key_by_its_query_heads():
    """Minitron's formula for heads, with the best pair of aggregations: two query heads of three columns share a key."""
    c = case(width=6, units=4)
    stats = InputStats(24, frozenset({Need.WINDOW_MEAN}), vector=3)
    for part in c.x.split([1, 3, 2]):
        stats.update(part)
    heads = [
        sum(sum(float(t[3 * h : 3 * h + 3].norm()) / TOKENS for t in window) ** 2 for window in c.x) ** 0.5
        for h in range(8)
    ]
    scores = [heads[2 * g] + heads[2 * g + 1] for g in range(4)]
    units = replace(c.given(build("minitron", {"units": 2})), stats=Stats(stats))
    keep = build("minitron", {"units": 2, "unit": "kv_groups"}).compress(units, 2).keep
    assert keep.nonzero()[:, 0].tolist() == sorted(sorted(range(4), key=lambda g: -scores[g])[:2])


def test_units_are_channels_by_the_dozen_or_heads_one_by_one():
    assert build("flap", {"kept": 0.8}).step == 32 and build("flap", {"kept": 0.8, "multiple": 8}).step == 8
    heads = build("paredown_width", {"kept": 0.8, "unit": "kv_groups"})
    assert heads.kind == "kv_groups" and heads.step == 1
    assert build("reap", {"kept": 0.8}).step == 1


def test_heads_cannot_be_folded():
    with pytest.raises(PareError, match=r"(?s)kv_groups do not allow.*paredown_width"):
        build("fold", {"kept": 0.8, "unit": "kv_groups"})
