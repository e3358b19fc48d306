"""The order of removal and the refit, against least squares solved anew for every subset of columns."""

from itertools import combinations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paredown.compress.errors import PareError
from paredown.compress.numerics.units import obs_order, output_metric, refitted

TINY = 1e-12  # a damping that only keeps the factorisation going


def problem(out, inner, seed=0):
    """A weight, correlated inputs (tokens, in), and a metric of outputs, float64."""
    draw = torch.Generator().manual_seed(seed)
    mix, delta = torch.randn(inner, inner, generator=draw), torch.randn(3 * out, out, generator=draw)
    x = (torch.randn(5 * inner, inner, generator=draw) @ mix).double()
    weight = torch.randn(out, inner, generator=draw).double()
    return weight, x, (delta.T @ delta).double() / len(delta)


def columns_of(units, width):
    return [unit * width + i for unit in sorted(units) for i in range(width)]


def fitted_by_lstsq(weight, x, stay):
    """The weight on the columns `stay`, by a QR solve on the data itself."""
    return torch.linalg.lstsq(x[:, stay], x @ weight.T).solution.T


def loss_without(weight, x, metric, gone, width=1):
    """tr(G E H E^T) of the best weight without the units that are `gone`."""
    stay = columns_of(set(range(weight.shape[1] // width)) - set(gone), width)
    error = weight.clone()
    if stay:
        error[:, stay] -= fitted_by_lstsq(weight, x, stay)
    output = x @ error.T  # (tokens, out)
    return float(((output @ metric) * output).sum()) / len(x)


def slow_order(weight, x, metric, width):
    """Each round tries every unit that is left, with a least squares solve of its own."""
    gone, losses, units = [], [], weight.shape[1] // width
    while len(gone) < units:
        tried = {u: loss_without(weight, x, metric, [*gone, u], width) for u in range(units) if u not in gone}
        best = min(tried, key=tried.__getitem__)
        gone.append(best)
        losses.append(tried[best])
    return gone, losses


def gram_of(x):
    return x.T @ x / len(x)


def given(weight, metric):
    """The metric in the form in which it is measured."""
    return weight.T @ metric @ weight if weight.shape[0] > weight.shape[1] else metric


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("out", "inner", "width"), [(5, 12, 1), (12, 12, 1), (16, 9, 1), (5, 15, 3), (20, 12, 3)])
def test_every_step_takes_the_unit_that_a_loop_over_all_refits_takes(out, inner, width, weighted):
    weight, x, metric = problem(out, inner)
    metric = metric if weighted else torch.eye(out).double()
    wanted, losses = slow_order(weight, x, metric, width)
    form = given(weight, metric) if weighted else None
    order, found = obs_order(weight, gram_of(x), form, TINY, width, step=1, pool=inner)
    assert order.tolist() == wanted
    torch.testing.assert_close(found, torch.tensor(losses).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("step", "pool"), [(1, 2), (3, 5), (4, 100), (16, 64)])
@pytest.mark.parametrize("width", [1, 2])
def test_the_losses_are_true_whatever_the_pool(step, pool, width):
    weight, x, metric = problem(6, 24)
    order, losses = obs_order(weight, gram_of(x), metric, TINY, width, step=step, pool=pool)
    gone = order.tolist()
    assert sorted(gone) == list(range(24 // width)) and len(losses) == len(gone)
    for n, loss in enumerate(losses.tolist(), 1):
        assert loss == pytest.approx(loss_without(weight, x, metric, gone[:n], width), rel=1e-6)


def test_steps_inside_a_pool_of_all_units_are_exact_and_need_no_whole_downdate():
    weight, x, metric = problem(6, 24)
    single, _ = obs_order(weight, gram_of(x), metric, step=1, pool=24)
    together, _ = obs_order(weight, gram_of(x), metric, step=24, pool=24)
    assert torch.equal(single, together)


@pytest.mark.parametrize("width", [1, 2])
def test_only_as_many_go_as_are_to_go_and_they_are_the_first(width):
    weight, x, metric = problem(6, 24)
    order, losses = obs_order(weight, gram_of(x), metric, width=width, step=4, pool=8)
    for stop in (0, 1, 5, 12, 24 // width):
        some, lost = obs_order(weight, gram_of(x), metric, width=width, stop=stop, step=4, pool=8)
        assert len(some) == len(lost) == 24 // width - stop
        assert set(some.tolist()) <= set(order.tolist()) and some.dtype == torch.int64
        if (24 // width - stop) % 4 == 0:
            assert torch.equal(some, order[: len(some)])
            torch.testing.assert_close(lost, losses[: len(some)])


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_between_the_best_of_all_subsets_and_scores_of_size(seed):
    weight, x, metric = problem(4, 8, seed)
    _, losses = obs_order(weight, gram_of(x), metric, TINY)
    sizes = (weight.square().sum(0) * gram_of(x).diagonal()).argsort().tolist()
    by_size = total = 0.0
    for n in range(1, 8):
        best = min(loss_without(weight, x, metric, gone) for gone in combinations(range(8), n))
        assert float(losses[n - 1]) >= best - 1e-9
        total += float(losses[n - 1]) / best
        by_size += loss_without(weight, x, metric, sizes[:n]) / best
    assert total <= by_size


@pytest.mark.parametrize("kept", [1, 7, 11])
def test_the_refit_is_the_least_squares_solution_and_with_damping_the_ridge_around_the_own_weight(kept):
    weight, x, _ = problem(5, 12)
    keep = torch.zeros(12, dtype=torch.bool)
    keep[torch.randperm(12, generator=torch.Generator().manual_seed(1))[:kept]] = True
    stay = keep.nonzero()[:, 0].tolist()
    exact = refitted(weight, gram_of(x), keep, 0.0)
    torch.testing.assert_close(exact, fitted_by_lstsq(weight, x, stay), rtol=1e-7, atol=1e-9)
    damped = refitted(weight.float(), gram_of(x), keep, 0.3)
    assert damped.dtype == torch.float64
    ridge = 0.3 * gram_of(x).diagonal()[keep].mean()
    wide = torch.cat([x[:, stay], (len(x) * ridge).sqrt() * torch.eye(kept).double()])
    missing = torch.cat([x @ weight.T, (len(x) * ridge).sqrt() * weight[:, stay].T])
    torch.testing.assert_close(damped, torch.linalg.lstsq(wide, missing).solution.T, rtol=1e-5, atol=1e-5)


def test_all_columns_that_stay_are_as_they_were():
    weight, x, _ = problem(5, 12)
    assert torch.equal(refitted(weight, gram_of(x), torch.ones(12, dtype=torch.bool), 0.01), weight)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("shape", [(5, 12), (20, 12)])
def test_units_that_nothing_reaches_go_first_and_for_nothing(shape, damping):
    weight, x, metric = problem(*shape)
    x[:, [2, 3, 8, 9]] = 0
    weight[:, [2, 9]] *= 100
    order, losses = obs_order(weight, gram_of(x), given(weight, metric), damping, width=2, step=1)
    assert set(order[:2].tolist()) == {1, 4} and losses[:2].tolist() == [0, 0] and losses[2] > 0
    keep = torch.ones(12, dtype=torch.bool)
    keep[[0, 2, 3]] = False
    assert torch.isfinite(refitted(weight, gram_of(x), keep, damping)).all()


def test_inputs_that_never_came_make_every_order_as_good():
    weight, _, metric = problem(5, 12)
    order, losses = obs_order(weight, torch.zeros(12, 12), metric, stop=4)
    assert len(set(order.tolist())) == 8 and not losses.any()


def test_moments_that_cannot_be_factored_are_refused_with_what_to_do():
    weight, x, _ = problem(5, 12)
    with pytest.raises(PareError, match="raise damping, or calibrate on more text"):
        obs_order(weight, -gram_of(x), damping=0.0)


def test_a_metric_without_full_rank_is_used_as_it_is():
    weight, x, metric = problem(6, 10)
    metric[0], metric[:, 0] = 0, 0
    wanted, losses = slow_order(weight, x, metric, 1)
    order, found = obs_order(weight, gram_of(x), metric, TINY, step=1)
    # of as few outputs as five, the last five units to stay lose nothing
    assert float(found[3]) == pytest.approx(losses[3], rel=1e-5) and order[:4].tolist() == wanted[:4]


@pytest.mark.parametrize("shape", [(5, 8), (8, 5)])
def test_the_metric_is_half_the_moment_between_it_and_all_outputs_alike(shape):
    weight, _, moment = problem(*shape)
    out = shape[0]
    half = moment / 2
    wanted = (half + 0.5 * half.diagonal().mean() * torch.eye(out)) / 1.5
    found = output_metric(weight, given(weight, moment), moment.diagonal(), 0.5)
    torch.testing.assert_close(found, given(weight, wanted))
    nothing = output_metric(weight, 0 * given(weight, moment), 0 * moment.diagonal(), 0.5)
    torch.testing.assert_close(nothing, given(weight, torch.eye(out).double()))


def test_no_tensor_is_larger_than_the_gram_matrix_or_the_weight():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return result

    weight, x, metric = problem(12, 60)
    gram = gram_of(x)
    for width in (1, 3):
        with Largest() as seen:
            obs_order(weight, gram, metric, width=width)
            refitted(weight, gram, torch.arange(60) < 30, 0.01)
        assert seen.numbers == 60 * 60
