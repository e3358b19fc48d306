"""Each low-rank method against its own paper's formula, written out slowly."""

from itertools import product
from math import sqrt

import pytest
import torch
from oracles import SHAPES, close, mean_square, root, truncated

from paredown.compress.allocation.base import Budget, Layer
from paredown.compress.allocation.by_share import PerType
from paredown.compress.errors import PareError
from paredown.compress.methods import build
from paredown.compress.methods.lowrank.cur import deim
from paredown.compress.storage import kinds


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_svd_is_the_truncated_svd(shape, rank, lowrank_problem):
    problem = lowrank_problem(shape)
    close(problem.compress("svd", rank=rank), truncated(problem.wide, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_svd_llm_is_truncation_after_whitening_by_cholesky(shape, rank, lowrank_problem):
    problem = lowrank_problem(shape)
    whitening = torch.linalg.cholesky(problem.x.double().T @ problem.x.double())
    wanted = truncated(problem.wide @ whitening, rank) @ torch.linalg.inv(whitening)
    close(problem.compress("svd_llm", rank=rank), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_loses_what_no_rank_k_map_of_the_outputs_can_keep(shape, lowrank_problem):
    problem = lowrank_problem(shape)
    edit, squares = problem.compress("svd_llm", rank=4), torch.linalg.svdvals(problem.outputs).square()
    wrong = problem.outputs - problem.x.double() @ edit.dense().double().T
    assert float(wrong.square().sum()) == pytest.approx(float(squares[4:].sum()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_asvd_weighs_columns_by_a_power_of_their_mean_size(shape, alpha, lowrank_problem):
    problem = lowrank_problem(shape)
    scale = problem.x.double().abs().mean(0) ** (0.5 if alpha is None else alpha)
    edit = problem.compress("asvd", rank=4, **({} if alpha is None else {"alpha": alpha}))
    close(edit, truncated(problem.wide * scale, 4) / scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["awsvd", "lorap"])
def test_awsvd_weighs_columns_by_the_norm_of_their_inputs(shape, name, lowrank_problem):
    problem = lowrank_problem(shape)
    scale = problem.x.double().norm(dim=0)
    close(problem.compress(name, rank=4), truncated(problem.wide * scale, 4) / scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("gradient", "need"), [("per_sequence", "fisher_rows"), ("per_token", "fisher_rows_per_token")]
)
def test_fwsvd_weighs_rows_by_the_root_of_their_fisher_information(shape, gradient, need, lowrank_problem):
    problem = lowrank_problem(shape)
    scale = problem.gradient()[need].sqrt()[:, None]
    wanted = truncated(scale * problem.wide, 4) / scale
    close(problem.compress("fwsvd", rank=4, gradient=gradient), wanted)
    assert need in build("fwsvd", {"gradient": gradient}).needs


def test_the_two_fisher_sums_are_not_the_same(lowrank_problem):
    problem = lowrank_problem()
    edits = [problem.compress("fwsvd", rank=4, gradient=g).dense() for g in ("per_sequence", "per_token")]
    assert not torch.allclose(*edits, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rom_keeps_the_principal_components_of_the_output_and_its_mean(shape, lowrank_problem):
    problem = lowrank_problem(shape)
    outputs = problem.outputs
    spread = outputs - outputs.mean(0)
    basis = torch.linalg.eigh(spread.T @ spread).eigenvectors.flip(1)[:, :4]
    edit = problem.compress("rom", rank=4)
    close(edit, basis @ basis.T @ problem.wide)
    torch.testing.assert_close(
        edit.shift, outputs.mean(0) - basis @ basis.T @ outputs.mean(0), rtol=0, atol=1e-4
    )  # the weight's own rounding is in the shift
    made = problem.x.double() @ edit.dense().double().T + edit.shift
    torch.testing.assert_close(made.mean(0), outputs.mean(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_rom_without_the_bias_is_the_paper_s_second_moment(shape, lowrank_problem):
    problem = lowrank_problem(shape)
    outputs = problem.outputs
    basis = torch.linalg.eigh(outputs.T @ outputs).eigenvectors.flip(1)[:, :4]
    edit = problem.compress("rom", rank=4, affine=False)
    close(edit, basis @ basis.T @ problem.wide)
    assert edit.shift is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_bias_of_rom_is_never_a_loss(shape, seed, lowrank_problem):
    problem = lowrank_problem(shape, seed=seed)
    for rank in range(1, 7):
        lost = []
        for affine in (True, False):
            edit = problem.compress("rom", rank=rank, affine=affine)
            shift = edit.shift if affine else 0
            lost.append(mean_square(problem.outputs - problem.x.double() @ edit.dense().double().T - shift))
        assert lost[0] <= lost[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_fisher_svd_is_truncation_between_the_roots_of_both_moments(shape, rank, lowrank_problem):
    problem = lowrank_problem(shape)
    left, right = root(problem.damped_outputs()), root(problem.second)
    middle = truncated(left @ problem.wide @ right, rank)
    close(problem.compress("fisher_svd", rank=rank), torch.linalg.inv(left) @ middle @ torch.linalg.inv(right))


def test_laser_keeps_a_share_of_the_largest_rank_in_the_last_blocks(lowrank_problem):
    problem = lowrank_problem((24, 30))
    edit = problem.compress("laser")
    assert edit.rank == 2  # a tenth of 24
    close(edit, truncated(problem.wide, 2))
    assert problem.compress("laser", rho=0.01).rank == 1  # never nothing
    assert problem.compress("laser", rho=0.4).rank == 9 and problem.compress("laser", rho=0.4, rank=3).rank == 3
    assert problem.compress("laser", rho=0.9) is None  # 21 of 24 would store more than the weight
    assert problem.compress("laser", rho=0.9, storage="pifa").rank == 21
    for last, count, chosen in ((0.25, 8, [6, 7]), (0.25, 2, [1]), (0.01, 5, [4]), (0.99, 3, [0, 1, 2])):
        assert build("laser", {"last": last}).chosen_blocks([0.0] * count) == chosen


def test_lorap_gives_values_and_outputs_three_times_the_numbers_of_queries_and_keys():
    method = build("lorap", {})
    assert method.strategy == "per_type"
    layers = [Layer(f"layers.0.{part}_proj", 240 * 240, method.choices((240, 240))) for part in "qkvo"]
    ranks = PerType(**method.spread).allocate(Budget(layers, 0.4))
    by_hand = {part: 0.4 * 4 * weight / (3 + 3 + 1 + 1) for part, weight in zip("qkvo", (1, 1, 3, 3), strict=True)}
    for part, share in by_hand.items():
        assert ranks[f"layers.0.{part}_proj"] == int(share * 240 * 240 / 480)
    assert ranks["layers.0.v_proj"] == 3 * ranks["layers.0.q_proj"]


def naive_deim(vectors):
    """Sorensen & Embree's algorithm 1: each vector minus its interpolation through the places found so far."""
    places = [int(vectors[:, 0].abs().argmax())]
    for j in range(1, vectors.shape[1]):
        known = vectors[:, :j]
        coefficients = torch.linalg.solve(known[places], vectors[places, j])
        places.append(int((vectors[:, j] - known @ coefficients).abs().argmax()))
    return places


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 9), (40, 15)])
@pytest.mark.parametrize("seed", range(4))
def test_deim_is_the_naive_interpolation(shape, seed):
    score = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, _, vt = torch.linalg.svd(score, full_matrices=False)
    for rank in (1, 3, min(shape)):
        rows, columns = deim(score, rank)
        assert rows.tolist() == naive_deim(u[:, :rank]) and columns.tolist() == naive_deim(vt[:rank].T)
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == rank


def test_deim_finds_rows_even_where_the_score_has_less_rank():
    score = torch.zeros(8, 10).double()
    score[2, 3], score[5, 1] = 2.0, 1.0
    rows, columns = deim(score, 4)
    assert rows[:2].tolist() == [2, 5] and columns[:2].tolist() == [3, 1]
    assert len(set(rows.tolist())) == len(set(columns.tolist())) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_cur_keeps_rows_and_columns_of_the_weight_itself(shape, lowrank_problem):
    problem = lowrank_problem(shape)
    edit = problem.compress("cur", rank=4)
    score = torch.zeros_like(problem.wide)
    for i, j in product(*map(range, score.shape)):
        score[i, j] = abs(problem.weight[i, j]) * sqrt(float(problem.second[j, j]))
    u, _, vt = torch.linalg.svd(score, full_matrices=False)
    assert torch.equal(edit.parts["columns"], problem.weight[:, naive_deim(vt[:4].T)])
    assert torch.equal(edit.parts["rows"], problem.weight[naive_deim(u[:, :4])])
    assert edit.kind == "cur" and edit.numbers == 4 * sum(problem.weight.shape) + 16


def parts(edit):
    return (edit.parts[name].double() for name in ("columns", "link", "rows"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_weighted_link_is_the_least_squares_fit_of_the_outputs(shape, seed, lowrank_problem):
    problem = lowrank_problem(shape, seed=seed)
    columns, link, rows = parts(problem.compress("cur", rank=4))
    # every entry of the link is one unknown: what it alone adds to all outputs of all tokens
    hidden = problem.x.double() @ rows.T  # (tokens, rank)
    system = torch.einsum("oc,tr->tocr", columns, hidden).reshape(-1, 16)
    best = torch.linalg.lstsq(system, problem.outputs.reshape(-1, 1)).solution.reshape(4, 4)
    torch.testing.assert_close(link, best, rtol=0, atol=1e-4 * float(best.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_plain_link_is_the_fit_of_the_weight_and_costs_output(shape, seed, lowrank_problem):
    problem = lowrank_problem(shape, seed=seed)
    weighted, plain = (problem.compress("cur", rank=4, link=link) for link in ("gram", "plain"))
    columns, link, rows = parts(plain)
    wanted = torch.linalg.pinv(columns) @ problem.wide @ torch.linalg.pinv(rows)
    torch.testing.assert_close(link, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(weighted.parts[part], plain.parts[part]) for part in ("columns", "rows"))
    wrong = [problem.outputs - problem.x.double() @ e.dense().double().T for e in (weighted, plain)]
    assert mean_square(wrong[0]) < mean_square(wrong[1]) and weighted.loss < plain.loss
    weights = [float((problem.wide - e.dense().double()).square().sum()) for e in (weighted, plain)]
    assert weights[1] < weights[0]


def test_cur_by_itself_takes_the_paper_s_rank_and_the_blocks_that_turn_least():
    for out, inner in ((12, 20), (20, 12), (64, 64), (100, 37)):
        rank = build("cur", {}).planned_rank((out, inner))
        assert rank * (out + inner) + rank**2 < out * inner < (rank + 1) * (out + inner) + (rank + 1) ** 2
    assert build("cur", {"max_rank": 5}).planned_rank((64, 64)) == 5
    assert build("cur", {}).planned_rank((4096, 4096)) == 256
    angles = [0.0, 0.4, 0.1, 0.3, 0.2, 0.0]
    assert build("cur", {"blocks": 2}).chosen_blocks(angles) == [2, 4]
    assert build("cur", {}).chosen_blocks(angles) == [1, 2, 3, 4]
    assert build("cur", {"blocks": None}).chosen_blocks(angles) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("shape", [(4, 6), (400, 600), (1, 8)])
def test_the_paper_s_rank_of_cur_stores_less_than_the_weight_or_nothing(shape):
    method = build("cur", {})
    rank = method.planned_rank(shape)
    assert not rank or method.numbers(shape, rank) < shape[0] * shape[1]


@pytest.mark.parametrize("options", [{"energy": 0.7}, {"storage": "pifa"}])
def test_cur_refuses_an_energy_and_another_storage(options):
    with pytest.raises(PareError, match="cur has a storage of its own and no energy curve"):
        build("cur", options)


def planted(lowrank_problem, out=24, inner=32, seed=0):
    """Low rank plus a few large entries: neither alone describes it."""
    problem = lowrank_problem((out, inner), seed=seed)
    draw = torch.Generator().manual_seed(seed + 100)
    low = torch.randn(out, 2, generator=draw) @ torch.randn(2, inner, generator=draw)
    spikes = torch.randn(out, inner, generator=draw) * (torch.rand(out, inner, generator=draw) < 0.15)
    problem.weight = low + 3 * spikes + 0.05 * torch.randn(out, inner, generator=draw)
    problem.wide = problem.weight.double()
    return problem


def output_error(problem, edit):
    wrong = problem.outputs - problem.x.double() @ edit.dense().double().T
    return mean_square(wrong) / mean_square(problem.outputs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.8, "2:4"])
def test_sparse_and_low_rank_together_beat_each_alone(sparsity, seed, lowrank_problem):
    problem = planted(lowrank_problem, seed=seed)
    both = problem.compress("sparse_low_rank", sparsity=sparsity, rank=2)
    sparse = problem.compress("sparsegpt", sparsity=sparsity)
    low = problem.compress("svd_llm", rank=2)
    assert output_error(problem, both) < 0.5 * min(output_error(problem, sparse), output_error(problem, low))


@pytest.mark.parametrize("seed", range(3))
def test_sparse_and_low_rank_beat_each_alone_at_the_same_count_of_numbers(seed, lowrank_problem):
    problem = planted(lowrank_problem, seed=seed)
    both = problem.compress("sparse_low_rank", sparsity=0.8, rank=2)
    size = problem.weight.numel()
    sparse = problem.compress("sparsegpt", sparsity=1 - both.numbers / size)
    low = problem.compress("svd_llm", rank=-(-both.numbers // sum(problem.weight.shape)))
    assert abs(sparse.numbers - both.numbers) <= 1 <= low.numbers - both.numbers + 1
    assert output_error(problem, both) < 0.8 * min(output_error(problem, sparse), output_error(problem, low))


@pytest.mark.parametrize(("sparsity", "rank"), [(0.5, 2), (0.8, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_all_rounds_the_best_is_kept_and_later_ones_help(shape, sparsity, rank, lowrank_problem):
    # a single round may well be worse than the one before
    problem = lowrank_problem(shape)
    losses = [problem.compress("sparse_low_rank", sparsity=sparsity, rank=rank, rounds=r).loss for r in range(1, 9)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_part_is_fitted_in_the_metric_of_the_whole_moment_to_what_the_other_leaves(
    shape, sparsity, lowrank_problem
):
    problem, whitening = lowrank_problem(shape), torch.linalg.cholesky(lowrank_problem(shape).second)
    prune = build("sparsegpt", {"sparsity": sparsity})
    sparse, found = torch.zeros_like(problem.wide), []
    for rounds in (1, 2, 3):
        low = truncated((problem.wide - sparse) @ whitening, 2) @ torch.linalg.inv(whitening)
        sparse = prune.compress((problem.wide - low).float(), problem.stats(prune)).weight.double()
        found.append(sparse + low)
        errors = [float(((problem.wide - f) @ whitening).square().sum()) for f in found]
        edit = problem.compress("sparse_low_rank", sparsity=sparsity, rank=2, rounds=rounds)
        close(edit, found[errors.index(min(errors))], 1e-4)


@pytest.mark.parametrize(
    ("sparsity", "kind"), [(0.37, "bitmap_lowrank"), ("2:4", "sparse24_lowrank"), ("1:4", "bitmap_lowrank")]
)
def test_sparse_and_low_rank_store_exactly_what_was_asked_for(sparsity, kind, lowrank_problem):
    problem = lowrank_problem()
    edit = problem.compress("sparse_low_rank", sparsity=sparsity, rank=2)
    removed = round(0.37 * 240) if sparsity == 0.37 else 240 - 240 * int(sparsity[0]) // 4
    assert edit.kind == kind and edit.rank == 2 and edit.numbers == 240 - removed + 2 * 32
    sparse = kinds.kind_of(kind.removesuffix("_lowrank")).unpack(edit.tensors(), (12, 20))
    assert int((sparse == 0).sum()) == removed
    torch.testing.assert_close(edit.dense(), sparse + edit.parts["left"] @ edit.parts["right"], rtol=0, atol=1e-5)
    spec = build("sparse_low_rank", {"sparsity": sparsity, "rank": 2}).expect((12, 20), 4)
    assert spec == edit.spec() and edit.damping == 0.01


def test_a_damping_that_sparse_plus_low_rank_had_to_raise_is_told(lowrank_problem):
    problem = lowrank_problem(tokens=4, sequences=2)
    edit = problem.compress("sparse_low_rank", rank=2, damping=0.0)
    assert edit.damping > 0 and edit.fallback == f"damping raised from 0 to {edit.damping:g}"
    assert problem.compress("sparse_low_rank", rank=2).fallback is None


def test_a_decomposition_of_cur_that_fails_is_a_fault_of_the_layer(lowrank_problem):
    problem = lowrank_problem()
    problem.weight[2, 3] = float("nan")
    with pytest.raises(PareError, match="singular value decomposition failed"):
        problem.compress("cur", rank=4)
