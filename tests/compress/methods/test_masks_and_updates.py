"""Each mask and update against slow loops of its formula and against exact optima, and every pair of them."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import MASKS, UPDATES, build
from paredown.compress.numerics.admm import UnitMoment, admm, raised
from paredown.compress.numerics.masked_least_squares import damped_gram, fitted, row_losses
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.numerics.moments import GRADIENT_NEEDS, PAIRED_NEEDS, InputStats, Stats
from paredown.compress.numerics.obs import obs_mask
from paredown.compress.numerics.swaps import _best_swaps, swapped
from paredown.compress.survey.gradients import moments

PATTERN = NofM(2, 4)


def problem(out=6, inner=16, seed=0, dtype=torch.float32):
    """A weight (out, in), and all the statistics that a method reads of correlated inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(300, inner, generator=draw) @ (
        torch.randn(inner, inner, generator=draw) * torch.linspace(2, 0.2, inner)
    )
    inputs = InputStats(inner, PAIRED_NEEDS)
    inputs.update(x, x)
    weight = torch.randn(out, inner, generator=draw).to(dtype)
    sums = dict(moments(GRADIENT_NEEDS, weight, x, torch.randn(300, out, generator=draw), sequences=5))
    return weight, Stats(inputs, {need: total.double() / 300 for need, total in sums.items()})


def gram_of(stats, damping=0.01):
    """What the solvers minimise with, in float64."""
    gram = stats.inputs.gram
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def loss(weight, edited, gram):
    return float(row_losses(weight.double(), edited.double(), gram).sum())


def exact(weight, keep, gram):
    """Least squares on a mask, by a solve for each row."""
    best = torch.zeros(weight.shape, dtype=torch.float64)
    for row, stays in enumerate(keep):
        s = stays.nonzero().flatten()
        best[row, s] = torch.linalg.solve(gram[s][:, s], gram[s] @ weight[row].double())
    return best


def pruned(stats, weight, mask, update, **options):
    return build("masked", {"mask": mask, "update": update, "sparsity": "2:4", **options}).compress(weight, stats)


def test_the_fit_on_a_mask_is_the_exact_optimum():
    weight, stats = problem()
    gram, keep = gram_of(stats), keep_mask(weight.abs(), PATTERN)
    wanted = exact(weight, keep, gram)
    torch.testing.assert_close(fitted(weight.double(), keep, gram, 12), wanted, rtol=1e-8, atol=1e-9)
    narrow = fitted(weight, keep, damped_gram(stats.inputs.gram, 0.01), 20)
    assert loss(weight, narrow, gram) <= 1.0001 * loss(weight, wanted, gram)


def test_dead_inputs_do_no_harm():
    weight, _ = problem()
    x = torch.randn(50, 16)
    x[:, 3:9] = 0
    inputs = InputStats(16, PAIRED_NEEDS)
    inputs.update(x, x)
    for mask, update in [("admm", "least_squares"), ("obc", "swaps")]:
        edit = pruned(Stats(inputs), weight, mask, update)
        assert torch.isfinite(edit.weight).all() and edit.keep.view(6, 4, 4).sum(-1).eq(2).all()


@pytest.mark.parametrize("sparsity", [PATTERN, NofM(1, 4), 0.5])
def test_exact_obs_removes_what_a_slow_loop_removes(sparsity):
    weight, stats = problem()
    gram = gram_of(stats)
    keep = obs_mask(weight, gram, sparsity)
    for row in range(len(weight)):
        w, live = weight[row].double().clone(), list(range(16))
        while len(live) > (8 if sparsity == 0.5 else 4 * sparsity.n):
            inverse = torch.linalg.inv(gram[live][:, live])
            scores = w[live] ** 2 / inverse.diagonal()
            if isinstance(sparsity, NofM):
                for i, column in enumerate(live):
                    if sum(other // 4 == column // 4 for other in live) <= sparsity.n:
                        scores[i] = torch.inf
            p = int(scores.argmin())
            w[live] = w[live] - inverse[:, p] * (w[live[p]] / inverse[p, p])
            del live[p]
        assert keep[row].nonzero().flatten().tolist() == live


@pytest.mark.parametrize(("sparsity", "steps"), [(PATTERN, 60), (0.6, 60), (0.6, 1), (PATTERN, 4)])
def test_admm_is_its_slow_form(sparsity, steps):
    weight, stats = problem(4, 8)
    gram = damped_gram(stats.inputs.gram, 0.01)
    scale = gram.diagonal().double().sqrt()
    h, wanted = gram.double() / scale[:, None] / scale, weight.double() * scale
    sparse, dual, rho = wanted.clone(), torch.zeros_like(wanted), 0.1
    settled = keep_mask(wanted.abs(), sparsity, within="layer")
    for i in range(1, steps + 1):
        free = (wanted @ h - dual + rho * sparse) @ torch.linalg.inv(h + rho * torch.eye(8).double())
        keep = keep_mask((free + dual / rho).abs(), sparsity, within="layer")
        sparse = (free + dual / rho) * keep
        dual = dual + rho * (free - sparse)
        if i % 3 == 0:
            changed = int((keep != settled).sum()) / int(keep.sum())
            if changed == 0:
                break
            rho, settled = rho * (1.3 if changed >= 0.1 else 1.2 if changed >= 0.005 else 1.1), keep
    found, start = admm(weight, UnitMoment(gram), sparsity, steps, 0.1)
    assert torch.equal(found, keep)
    torch.testing.assert_close(start.double(), sparse / scale, rtol=1e-2, atol=1e-2)


def test_short_products_of_admm_cost_nothing_and_its_weights_are_a_better_start_than_the_dense_ones(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2048, 32, generator=generator) @ torch.randn(32, 256, generator=generator)
    x += 0.5 * torch.randn(2048, 256, generator=generator)
    x[:, 3] *= 50  # as of a sink
    gram = damped_gram((x.T @ x / 2048).double(), 0.01)
    weight = torch.randn(192, 256, generator=generator)
    keep, start = admm(weight, UnitMoment(gram), PATTERN, 16, 0.3, 4, exact=False)

    def loss(x, mask=keep):
        assert not x[~mask].any()
        return float(row_losses(weight, x, gram).sum())

    best = loss(fitted(weight, keep, gram, 100))
    assert loss(fitted(weight, keep, gram, 4, start)) < 1.002 * best < loss(fitted(weight, keep, gram, 4))
    monkeypatch.setattr("paredown.compress.numerics.admm.short_products", lambda kind: nullcontext())
    other, _ = admm(weight, UnitMoment(gram), PATTERN, 16, 0.3, 4)
    assert float((other != keep).float().mean()) < 0.02
    assert loss(fitted(weight, other, gram, 100), other) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize("growth", [1.1, 1.42, 3.0])
def test_a_raised_inverse_is_as_near_as_its_bound_says_and_no_nearer(growth, monkeypatch):
    monkeypatch.setattr("paredown.compress.numerics.admm.short_products", lambda kind: nullcontext())
    values = torch.cat([torch.zeros(1), torch.logspace(-4, 3, 200)]).double()
    d = growth - 1
    found = raised(torch.diag(1 / (values + 0.3)), 0.3, growth).diagonal()
    errors = (found * (values + growth * 0.3) - 1).abs()
    assert float(errors.max()) == pytest.approx(d**2 / (d**2 + 8 * d + 8), rel=1e-3)


def test_the_first_inverse_serves_every_sparsity_until_more_tokens_come():
    _, stats = problem()
    first = stats.inputs.unit_moment(0.01)
    assert stats.inputs.unit_moment(0.01) is first and first.inverse(0.3) is first.inverse(0.3)
    rebuilt = first.matrix * first.scale[:, None] * first.scale
    torch.testing.assert_close(rebuilt, damped_gram(stats.inputs.gram, 0.01), rtol=1e-5, atol=1e-5)
    for penalty in (0.3, 0.36):
        exact = (first.matrix.double() + penalty * torch.eye(16)).inverse()
        torch.testing.assert_close(first.inverse(penalty).double(), exact, rtol=1e-4, atol=1e-5)
    stats.inputs.update(torch.randn(10, 16), torch.randn(10, 16))
    assert stats.inputs.unit_moment(0.01) is not first


def test_ria_and_fisher_are_their_formulas():
    weight, stats = problem()
    norm, fisher = stats.inputs.rms, stats.gradient("fisher")
    ria = build("ria", {"sparsity": "2:4"}).compress(weight, stats).keep
    by_fisher = pruned(stats, weight, "fisher", "none").keep
    size = weight.abs().double()
    for row in range(6):
        for first in range(0, 16, 4):
            group = range(first, first + 4)
            shares = [
                float((size[row, j] / size[:, j].sum() + size[row, j] / size[row].sum()) * norm[j] ** 0.5)
                for j in group
            ]
            costs = [float(size[row, j] ** 2 * fisher[row, j]) for j in group]
            for keep, scores in ((ria, shares), (by_fisher, costs)):
                best = sorted(range(4), key=lambda k: -scores[k])[:2]
                assert [k for k in range(4) if keep[row, first + k]] == sorted(best)


def test_the_gain_of_a_swap_is_exact():
    weight, stats = problem()
    gram, keep = gram_of(stats), keep_mask(weight.abs(), PATTERN)
    x = fitted(weight.double(), keep, gram, 3)  # far from its optimum
    before = row_losses(weight.double(), x, gram)
    gains, removed, added = _best_swaps(weight.double(), x, keep, gram, 4)
    for row in range(6):
        for group in range(4):
            best = -torch.inf
            for p, q in [
                (p, q) for p in range(4) for q in range(4) if keep[row, 4 * group + p] and not keep[row, 4 * group + q]
            ]:
                tried = x[row].clone()
                tried[4 * group + p] = 0
                place = 4 * group + q
                tried[place] = ((weight[row].double() - tried) @ gram)[place] / gram[place, place]
                gain = before[row] - row_losses(weight[row][None].double(), tried[None], gram)[0]
                if gain > best:
                    best, chosen = gain, (p, q)
            assert float(gains[row, group]) == pytest.approx(float(best), rel=1e-6, abs=1e-9)
            assert (int(removed[row, group]), int(added[row, group])) == chosen


@pytest.mark.parametrize("seed", range(5))
def test_losses_stand_in_their_order(seed):
    weight, stats = problem(2, 8, seed)
    gram = gram_of(stats)
    optimum = 0.0
    pairs = [torch.tensor(p) for p in combinations(range(4), 2)]
    for row in weight:
        keeps = torch.zeros(36, 8, dtype=torch.bool)
        for i, (a, b) in enumerate((a, b) for a in pairs for b in pairs):
            keeps[i, [*a.tolist(), *(4 + b).tolist()]] = True
        rows = row.expand(36, -1)
        optimum += float(row_losses(rows.double(), exact(rows, keeps, gram), gram).min())
    wanda, fit, swaps = (pruned(stats, weight, "wanda", update) for update in ("none", "least_squares", "swaps"))
    losses = [loss(weight, edit.weight, gram) for edit in (swaps, fit, wanda)]
    assert optimum <= 1.001 * losses[0] and losses[0] <= 1.001 * losses[1] and losses[1] <= losses[2]
    ours = build("paredown_prune", {"sparsity": "2:4"}).compress(weight, stats)
    assert optimum <= 1.001 * loss(weight, ours.weight, gram)


@pytest.mark.parametrize("seed", range(3))
def test_ours_loses_less_than_sparsegpt_and_that_less_than_a_mask_alone(seed):
    weight, stats = problem(32, 64, seed)
    edits = [build(n, {"sparsity": "2:4"}).compress(weight, stats) for n in ("paredown_prune", "sparsegpt", "wanda")]
    ours, sparsegpt, wanda = (loss(weight, edit.weight, gram_of(stats)) for edit in edits)
    assert ours < 0.9 * sparsegpt and sparsegpt < 0.9 * wanda


@pytest.mark.parametrize("sparsity", [PATTERN, 0.5])
def test_swaps_keep_the_counts_and_lower_the_loss_of_every_row(sparsity):
    weight, stats = problem(12, 64)
    gram, keep = damped_gram(stats.inputs.gram, 0.01), keep_mask(weight.abs(), sparsity)
    x, moved = swapped(weight, keep, gram, sparsity, 10, 10)
    assert torch.equal(moved.sum(1), keep.sum(1)) and not torch.equal(moved, keep)
    if sparsity == PATTERN:
        assert moved.view(12, 16, 4).sum(-1).eq(2).all()
    assert (x[~moved] == 0).all()
    assert (row_losses(weight, x, gram) <= row_losses(weight, fitted(weight, keep, gram, 10), gram)).all()


@pytest.mark.parametrize("update", UPDATES.classes())
@pytest.mark.parametrize("mask", MASKS.classes())
@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_any_mask_goes_with_any_update(sparsity, mask, update):
    weight, stats = problem(8, 16, dtype=torch.bfloat16)
    method = build("masked", {"mask": mask, "update": update, "sparsity": sparsity})
    edit = method.compress(weight, stats)
    assert edit.numbers == 64 and edit.weight.dtype == torch.bfloat16 and (edit.weight[~edit.keep] == 0).all()
    if sparsity == "2:4":
        assert edit.keep.view(8, 4, 4).sum(-1).eq(2).all()
    assert 0 < edit.relative_error(weight, stats.inputs) < 1


def test_exact_obs_refuses_layers_that_are_far_too_wide():
    inputs = InputStats(4100, frozenset({"gram"}))
    with pytest.raises(PareError, match=r"4100 inputs.*at most 4096.*sparsegpt or alps"):
        build("obc", {"sparsity": 0.5}).compress(torch.zeros(1, 4100), Stats(inputs))
