"""Our low-rank method against its formula over the tokens themselves, and each of its parts on and off."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from oracles import SHAPES, close, mean_square, rank_beside_a_bias, root, truncated

from paredown.compress.methods import build
from paredown.compress.numerics.metric import OUTPUT_DAMPING
from paredown.compress.numerics.moments import InputStats, Stats


def slow_paredown(problem, rank, two_sided, affine, regression, damping=0.3, output_damping=0.5, residual=False):
    """The weight and the bias at a rank, from the tokens themselves; what a change of the weight costs is one of them."""
    x, dense = problem.x.double(), (problem.dense if regression else problem.x).double()
    lost = problem.lost.double() if residual else torch.zeros(len(x), len(problem.weight)).double()
    means = [t.mean(0) if affine else 0 * t[0] for t in (x, dense, lost)]
    centred_x, centred_dense, centred_lost = (t - mean for t, mean in zip((x, dense, lost), means, strict=True))
    a = centred_x.T @ centred_x / len(x)
    c = centred_dense.T @ centred_x / len(x)
    added = damping * torch.diag(a.diagonal())
    aim = (problem.wide @ (c + added) + centred_lost.T @ centred_x / len(x)) @ torch.linalg.inv(a + added)
    left = root(problem.damped_outputs(output_damping)) if two_sided else torch.eye(len(aim)).double()
    right = root(a + added if regression else a)
    made = torch.linalg.inv(left) @ truncated(left @ aim @ right, rank) @ torch.linalg.inv(right)
    return made, problem.wide @ means[1] + means[2] - made @ means[0] if affine else None


def data_loss(problem, made, shift, two_sided=True, regression=True, residual=False):
    """What is wrong with the outputs, weighed by the gradients; made (out, in)."""
    wanted = (problem.dense if regression else problem.x).double() @ problem.wide.T
    wanted = wanted + problem.lost if residual else wanted
    wrong = wanted - problem.x.double() @ made.double().T - (0 if shift is None else shift)
    return mean_square(wrong @ root(problem.damped_outputs()) if two_sided else wrong)


SWITCHES = list(product((True, False), repeat=3))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize(("two_sided", "affine", "regression"), SWITCHES)
def test_each_part_of_ours_can_be_switched_off_and_the_rest_stays(
    shape, storage, two_sided, affine, regression, apart, lowrank_problem
):
    problem = lowrank_problem(shape, apart=apart)
    parts = {"two_sided": two_sided, "affine": affine, "regression": regression}
    seen = {"two_sided": two_sided, "regression": regression}
    wanted, shift = slow_paredown(problem, 4, affine=False, **seen)
    if affine:  # whichever loses less for the same numbers
        rank = rank_beside_a_bias(SHAPES[shape], 4, storage)
        biased = slow_paredown(problem, rank, affine=True, **seen)
        if data_loss(problem, *biased, **seen) < data_loss(problem, wanted, None, **seen):
            wanted, shift = biased
    edit = problem.compress("paredown_lowrank", rank=4, storage=storage, **parts)
    close(edit, wanted, 1e-4)
    assert edit.kind == ("lowrank" if storage == "factors" else storage)
    assert (edit.shift is not None) == (shift is not None) == (affine and regression and apart)
    if shift is not None:
        torch.testing.assert_close(edit.shift, shift, rtol=0, atol=1e-3)
    switched = {
        "gram": True, "mean": affine, "cross": regression, "residual": regression, "output_gradient": two_sided,
    }  # fmt: skip
    assert build("paredown_lowrank", parts).needs == {name for name, on in switched.items() if on}
    assert build("paredown_lowrank", {**parts, "residual": False}).needs == build("paredown_lowrank", parts).needs - {
        "residual"
    }
    assert not build("paredown_lowrank", parts).adds_bias


@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_is_taken_only_where_it_loses_less_than_more_components(shape, storage, lowrank_problem):
    """The choice is the better of both on the data themselves, and never stores more than was planned."""
    taken = []
    for seed, apart, two_sided, regression in product(range(3), *3 * [(True, False)]):
        problem = lowrank_problem(shape, seed=seed)
        problem.x = problem.x - problem.x.mean(0).round() if apart else problem.x
        for rank in (2, 4, 6):
            seen = {"two_sided": two_sided, "regression": regression}
            undamped = {"damping": 1e-9, "output_damping": OUTPUT_DAMPING}
            asked = {**undamped, "storage": storage, "affine": True, **seen}
            edit = problem.compress("paredown_lowrank", rank=rank, **asked)
            plain = problem.compress("paredown_lowrank", rank=rank, **{**asked, "affine": False})
            less = rank_beside_a_bias(SHAPES[shape], rank, storage)
            made, shift = slow_paredown(problem, less, affine=True, **undamped, **seen)
            lost = [data_loss(problem, e.dense(), e.shift, **seen) for e in (edit, plain)]
            assert lost[0] <= min(lost[1], data_loss(problem, made, shift, **seen)) * (1 + 1e-4)
            bias = 0 if edit.shift is None else len(edit.shift)
            assert edit.numbers + bias <= plain.numbers and edit.rank == (less if bias else rank)
            taken.append((regression, bool(bias)))
    assert (True, True) in taken and (True, False) in taken
    # the mean is one more direction of the second moment: a component that holds it loses no more than a bias
    assert (False, True) not in taken


def test_where_no_bias_fits_beside_rank_one_there_is_none(lowrank_problem):
    problem = lowrank_problem(apart=True)
    edit = problem.compress("paredown_lowrank", rank=1, storage="factors", affine=True)
    assert edit.rank == 1 and edit.shift is None
    assert problem.compress("paredown_lowrank", rank=2, storage="factors", affine=True).shift is not None


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_a_layer_that_writes_to_the_residual_stream_makes_up_for_what_it_lost(
    two_sided, affine, apart, lowrank_problem
):
    problem, seen = lowrank_problem("wide", apart=apart), {"two_sided": two_sided, "residual": True, "regression": True}
    options = {"rank": 4, "two_sided": two_sided, "affine": affine, "storage": "factors"}
    method = build("paredown_lowrank", options)
    edit = method.compress(problem.weight, replace(problem.stats(method), residual=problem.residual()))
    wanted, shift = slow_paredown(problem, 4, affine=False, **seen)
    if edit.shift is not None:
        wanted, shift = slow_paredown(problem, rank_beside_a_bias((12, 20), 4, "factors"), affine=True, **seen)
        torch.testing.assert_close(edit.shift, shift, rtol=0, atol=1e-3)
    close(edit, wanted, 1e-4)
    assert (edit.shift is not None) == (affine and apart)
    blind = problem.compress("paredown_lowrank", **{**options, "residual": False})
    lost = [data_loss(problem, e.dense(), e.shift, **seen) for e in (edit, blind)]
    assert lost[0] < 0.97 * lost[1]


@pytest.mark.parametrize("off", [{"residual": False}, {"regression": False}])
def test_what_was_lost_stays_lost_where_the_option_says_so(off, lowrank_problem):
    problem, method = lowrank_problem(apart=True), build("paredown_lowrank", {"rank": 4, "affine": True, **off})
    stats = problem.stats(build("paredown_lowrank", {"affine": True}))
    told = replace(stats, residual=problem.residual())
    assert torch.equal(method.target(problem.weight, told).value, method.target(problem.weight, stats).value)
    made = torch.zeros_like(problem.wide)
    assert torch.equal(method.shift(problem.weight, made, told), method.shift(problem.weight, made, stats))


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_without_its_parts_is_another_paper_bit_for_bit(shape, lowrank_problem):
    problem = lowrank_problem(shape)
    off = {"two_sided": False, "affine": False, "regression": False, "storage": "factors"}
    off["output_damping"] = OUTPUT_DAMPING
    for others, name in (({}, "svd_llm"), ({"affine": True}, "svd_llm"), ({"two_sided": True}, "fisher_svd")):
        mine = problem.compress("paredown_lowrank", rank=4, **{**off, **others})
        theirs = problem.compress(name, rank=4)
        assert all(torch.equal(mine.parts[key], theirs.parts[key]) for key in ("left", "right"))
        assert mine.loss == theirs.loss and mine.shift is theirs.shift is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_each_part_of_ours_earns_its_place_on_the_data(shape, seed, lowrank_problem):
    problem = lowrank_problem(shape, seed=seed, apart=True)

    def lost(**options):
        asked = {"damping": 0.0, "output_damping": OUTPUT_DAMPING, "affine": True, **options}
        edit = problem.compress("paredown_lowrank", rank=4, storage="factors", **asked)
        return data_loss(problem, edit.dense(), edit.shift)

    whole = lost()
    for part in ("two_sided", "affine", "regression"):
        assert whole < lost(**{part: False})


@pytest.mark.parametrize("shape", SHAPES)
def test_no_affine_map_of_that_rank_is_nearer_to_the_dense_output_than_ours(shape, lowrank_problem):
    problem = lowrank_problem(shape, apart=True)
    weigh = root(problem.damped_outputs())
    edit = problem.compress("paredown_lowrank", rank=4, affine=True, damping=0.0, output_damping=OUTPUT_DAMPING)
    inputs = torch.cat((problem.x.double(), torch.ones(len(problem.x), 1).double()), 1)
    wanted = problem.dense.double() @ problem.wide.T @ weigh
    left = torch.randn(len(problem.weight), edit.rank, generator=torch.Generator().manual_seed(0)).double()
    bias = wanted.mean(0)
    for _ in range(400):  # alternating least squares over right factor, left factor and bias
        right = torch.linalg.lstsq(
            inputs[:, :-1], torch.linalg.lstsq(left, (wanted - bias).T).solution.T
        ).solution  # (in, rank)
        hidden = torch.cat((inputs[:, :-1] @ right, inputs[:, -1:]), 1)
        solved = torch.linalg.lstsq(hidden, wanted).solution
        left, bias = solved[:-1].T, solved[-1]
    best = mean_square(wanted - hidden @ solved)
    assert edit.shift is not None
    assert data_loss(problem, edit.dense(), edit.shift) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_damping_counts_as_data_that_say_the_weight_is_right_as_it_is(shape, lowrank_problem):
    """E|W x - W' y|^2 + lambda sum_j E[y_j^2] |W_j - W'_j|^2: ridge regression towards the weight, at any rank."""
    problem, asked = lowrank_problem(shape), {"rank": 4, "two_sided": False}
    damped = problem.compress("paredown_lowrank", damping=0.3, **asked)
    more = torch.diag((0.3 * problem.x.square().sum(0)).sqrt())
    problem.x, problem.dense = (torch.cat((t, more.to(t.dtype))) for t in (problem.x, problem.dense))
    close(problem.compress("paredown_lowrank", damping=0.0, **asked), damped.dense().double(), 1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_survey_of_the_dense_model_aims_at_the_weight_itself(shape, lowrank_problem):
    problem, method = lowrank_problem(shape), build("paredown_lowrank", {"rank": 4})
    inputs = InputStats(problem.weight.shape[1], frozenset({"gram", "mean"}))
    inputs.update(problem.x)
    blind = Stats(inputs, problem.gradient())
    assert torch.equal(method.target(problem.weight, blind).value, problem.wide)
    off = build("paredown_lowrank", {"rank": 4, "regression": False})
    assert torch.equal(method.losses(problem.weight, blind), off.losses(problem.weight, blind))


def test_the_regression_stays_off_though_both_streams_were_followed(lowrank_problem):
    problem = lowrank_problem()
    off = build("paredown_lowrank", {"rank": 4, "regression": False})
    paired = problem.stats(build("paredown_lowrank", {}))
    assert torch.equal(off.target(problem.weight, paired).value, problem.wide)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_ours_takes_fewer_tokens_than_inputs_too(shape, affine, lowrank_problem):
    problem = lowrank_problem(shape, tokens=4, sequences=2)
    problem.x[:, :3] = 0
    edit = problem.compress("paredown_lowrank", rank=5, affine=affine)
    made = problem.x.double() @ edit.dense().double().T + (0 if edit.shift is None else edit.shift)
    wanted = problem.dense.double() @ problem.wide.T
    assert torch.isfinite(edit.dense()).all() and mean_square(made - wanted) < 0.05 * mean_square(wanted)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("still", [slice(None), slice(3)])
def test_ours_takes_inputs_that_never_change(still, shape, affine, lowrank_problem):
    problem = lowrank_problem(shape)
    for value in (1.0, 1234.567):  # whose sums of squares are rounded
        problem.x[:, still] = problem.dense[:, still] = value
        assert torch.isfinite(problem.compress("paredown_lowrank", rank=5, affine=affine).dense()).all()


@pytest.mark.parametrize("affine", [False, True])
def test_a_layer_that_makes_up_for_the_stream_is_measured_by_what_it_aims_at(affine, lowrank_problem):
    """What the stream lacks is many times the layer's own output here: from the dense weight the edit is far by intention."""
    problem = lowrank_problem("wide")
    problem.lost = 30 * problem.x[:, :12].flip(1) + problem.lost
    method = build("paredown_lowrank", {"kept": 0.95, "two_sided": False, "affine": affine})
    stats = Stats(problem.inputs(method), residual=problem.residual())
    edit = method.compress(problem.weight, stats)
    inputs = problem.x.double() if edit.shift is None else problem.x.double() - problem.mean
    wrong = (inputs @ (edit.aim.double() - edit.dense().double()).T).square().sum()
    share = float(wrong / (problem.x.double() @ edit.aim.double().T).square().sum())
    assert edit.missed(problem.weight, stats.inputs) == pytest.approx(share, rel=1e-3)
    assert share < 0.2 and edit.relative_error(problem.weight, stats.inputs) > 1
    assert edit.final().aim is None and torch.equal(edit.final().dense(), edit.dense())
