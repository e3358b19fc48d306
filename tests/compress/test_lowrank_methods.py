"""Each low-rank method against its own paper's formula, written out slowly, and what all of them promise of their options."""

from itertools import product
from math import sqrt

import pytest
import torch

from paredown.compress import kinds
from paredown.compress.allocation import Curve, by_share
from paredown.compress.errors import PareError
from paredown.compress.lowrank import OUTPUT_DAMPING, largest_rank
from paredown.compress.methods import build
from paredown.compress.methods.cur import deim
from paredown.compress.statistics import GRADIENT_NEEDS, PAIRED_NEEDS, InputStats

SHAPES = {"wide": (12, 20), "tall": (20, 12)}
# methods that store factors of what one metric calls the best, with a small option or two
FACTORED = {
    "svd": {}, "fwsvd": {}, "asvd": {}, "awsvd": {}, "svd_llm": {}, "rom": {}, "fisher_svd": {}, "paredown_lowrank": {},
    "laser": {}, "lorap": {},
}  # fmt: skip
RANKED = {**FACTORED, "cur": {}}
ALL = {**RANKED, "sparse_low_rank": {"rounds": 2}}


class Problem:
    """A weight (out, in), inputs of both streams (tokens, in) and gradients (tokens, out) of a few sequences.

    Inputs are small whole numbers, correlated and with a mean, so that float32 sums of their products are exact. `lost`
    (tokens, out) is what a residual stream around the layer has lost.
    """

    def __init__(self, shape="wide", tokens=240, sequences=8, seed=0, dtype=torch.float32, apart=False):
        out, inner = SHAPES[shape] if isinstance(shape, str) else shape
        draw = torch.Generator().manual_seed(seed)

        def whole(low, high, *size):
            return torch.randint(low, high + 1, size, generator=draw).float()

        self.weight = torch.randn(out, inner, generator=draw).to(dtype)
        self.dense = whole(-3, 3, tokens, inner) @ whole(-1, 1, inner, inner) + whole(-5, 5, inner)
        self.x = self.dense + whole(-3, 3, tokens, inner) + 1
        if apart:  # the compressed stream has lost its mean, so that a map without a bias cannot give it
            self.x, self.dense = self.x - self.x.mean(0).round(), self.dense + 9
        self.delta = torch.randn(tokens, out, generator=draw) @ torch.randn(out, out, generator=draw)
        self.lost = (self.x[:, :out] if out <= inner else self.x.repeat(1, 2)[:, :out]).flip(1) + whole(
            -9, 9, tokens, out
        )
        self.sequences = sequences
        self.wide = self.weight.double()
        self.second = self.x.double().T @ self.x.double() / tokens  # (in, in)
        self.mean, self.dense_mean = self.x.double().mean(0), self.dense.double().mean(0)
        self.covariance = self.second - torch.outer(self.mean, self.mean)

    @property
    def outputs(self):
        """(tokens, out)"""
        return self.x.double() @ self.wide.T

    def gradient(self):
        """Moments of the gradients per token, by loops over tokens and sequences."""
        delta, x, (out, inner) = self.delta.double(), self.x.double(), self.weight.shape
        tokens = len(x)
        moment = sum(torch.outer(d, d) for d in delta) / tokens
        fisher, per_token = torch.zeros(out, inner).double(), torch.zeros(out, inner).double()
        for begin in range(0, tokens, tokens // self.sequences):
            summed = torch.zeros(out, inner).double()
            for t in range(begin, begin + tokens // self.sequences):
                summed += torch.outer(delta[t], x[t])
                per_token += torch.outer(delta[t], x[t]) ** 2
            fisher += summed**2
        return {
            "output_gradient": moment if out <= inner else self.wide.T @ moment @ self.wide,
            "output_gradient_diagonal": moment.diagonal(),
            "fisher_rows": fisher.sum(1) / tokens,
            "fisher_rows_per_token": per_token.sum(1) / tokens,
        }

    def inputs(self, method):
        """Moments of the inputs that the method asks for, fed in uneven batches."""
        stats = InputStats(self.weight.shape[1], method.needs & PAIRED_NEEDS)
        for x, dense in zip(self.x.tensor_split([7, 50]), self.dense.tensor_split([7, 50]), strict=True):
            stats.update(x, dense if "cross" in method.needs else None)
        return stats

    def stats(self, method):
        stats = self.inputs(method)
        return stats.with_gradient(self.gradient()) if method.needs & GRADIENT_NEEDS else stats

    def residual(self):
        """As `observe_writer` finds them."""
        lost = self.lost.double()
        return {"residual": lost.T @ self.x.double() / len(lost), "residual_mean": lost.mean(0)}

    def compress(self, name, **options):
        method = build(name, options)
        return method.compress(self.weight, self.stats(method))


def truncated(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def damped_outputs(problem):
    """G (out, out) with what is added for directions that no gradient saw."""
    delta = problem.delta.double()
    moment = delta.T @ delta / len(delta)
    return moment + OUTPUT_DAMPING * moment.diagonal().mean() * torch.eye(len(moment)).double()


def close(edit, wanted, within=2e-5):
    torch.testing.assert_close(edit.dense().double(), wanted, rtol=0, atol=within * float(wanted.abs().max()))


def mean_square(rows):
    return float(rows.square().sum(1).mean())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_svd_is_the_truncated_svd(shape, rank):
    problem = Problem(shape)
    close(problem.compress("svd", rank=rank), truncated(problem.wide, rank))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_svd_llm_is_truncation_after_whitening_by_cholesky(shape, rank):
    problem = Problem(shape)
    whitening = torch.linalg.cholesky(problem.x.double().T @ problem.x.double())
    wanted = truncated(problem.wide @ whitening, rank) @ torch.linalg.inv(whitening)
    close(problem.compress("svd_llm", rank=rank), wanted)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_loses_what_no_rank_k_map_of_the_outputs_can_keep(shape):
    problem = Problem(shape)
    edit, squares = problem.compress("svd_llm", rank=4), torch.linalg.svdvals(problem.outputs).square()
    wrong = problem.outputs - problem.x.double() @ edit.dense().double().T
    assert float(wrong.square().sum()) == pytest.approx(float(squares[4:].sum()), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_asvd_weighs_columns_by_a_power_of_their_mean_size(shape, alpha):
    problem = Problem(shape)
    scale = problem.x.double().abs().mean(0) ** (0.5 if alpha is None else alpha)
    edit = problem.compress("asvd", rank=4, **({} if alpha is None else {"alpha": alpha}))
    close(edit, truncated(problem.wide * scale, 4) / scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["awsvd", "lorap"])
def test_awsvd_weighs_columns_by_the_norm_of_their_inputs(shape, name):
    problem = Problem(shape)
    scale = problem.x.double().norm(dim=0)
    close(problem.compress(name, rank=4), truncated(problem.wide * scale, 4) / scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("gradient", "need"), [("per_sequence", "fisher_rows"), ("per_token", "fisher_rows_per_token")]
)
def test_fwsvd_weighs_rows_by_the_root_of_their_fisher_information(shape, gradient, need):
    problem = Problem(shape)
    scale = problem.gradient()[need].sqrt()[:, None]
    wanted = truncated(scale * problem.wide, 4) / scale
    close(problem.compress("fwsvd", rank=4, gradient=gradient), wanted)
    assert need in build("fwsvd", {"gradient": gradient}).needs


def test_the_two_fisher_sums_are_not_the_same():
    problem = Problem()
    edits = [problem.compress("fwsvd", rank=4, gradient=g).dense() for g in ("per_sequence", "per_token")]
    assert not torch.allclose(*edits, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_rom_keeps_the_principal_components_of_the_output_and_its_mean(shape):
    problem = Problem(shape)
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
def test_rom_without_the_bias_is_the_paper_s_second_moment(shape):
    problem = Problem(shape)
    outputs = problem.outputs
    basis = torch.linalg.eigh(outputs.T @ outputs).eigenvectors.flip(1)[:, :4]
    edit = problem.compress("rom", rank=4, affine=False)
    close(edit, basis @ basis.T @ problem.wide)
    assert edit.shift is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_bias_of_rom_is_never_a_loss(shape, seed):
    problem = Problem(shape, seed=seed)
    for rank in range(1, 7):
        lost = []
        for affine in (True, False):
            edit = problem.compress("rom", rank=rank, affine=affine)
            shift = edit.shift if affine else 0
            lost.append(mean_square(problem.outputs - problem.x.double() @ edit.dense().double().T - shift))
        assert lost[0] <= lost[1]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_fisher_svd_is_truncation_between_the_roots_of_both_moments(shape, rank):
    problem = Problem(shape)
    left, right = root(damped_outputs(problem)), root(problem.second)
    middle = truncated(left @ problem.wide @ right, rank)
    close(problem.compress("fisher_svd", rank=rank), torch.linalg.inv(left) @ middle @ torch.linalg.inv(right))


def slow_paredown(problem, rank, two_sided, affine, regression, damping=0.01, residual=False):
    """The weight and the bias at a rank, from the tokens themselves."""
    x, dense = problem.x.double(), (problem.dense if regression else problem.x).double()
    lost = problem.lost.double() if residual else torch.zeros(len(x), len(problem.weight)).double()
    means = [t.mean(0) if affine else 0 * t[0] for t in (x, dense, lost)]
    centred_x, centred_dense, centred_lost = (t - mean for t, mean in zip((x, dense, lost), means, strict=True))
    a = centred_x.T @ centred_x / len(x)
    c = centred_dense.T @ centred_x / len(x)
    added = damping * a.diagonal().mean() * torch.eye(len(a)).double()
    aim = (problem.wide @ (c + added) + centred_lost.T @ centred_x / len(x)) @ torch.linalg.inv(a + added)
    left, right = root(damped_outputs(problem)) if two_sided else torch.eye(len(aim)).double(), root(a)
    made = torch.linalg.inv(left) @ truncated(left @ aim @ right, rank) @ torch.linalg.inv(right)
    return made, problem.wide @ means[1] + means[2] - made @ means[0] if affine else None


def data_loss(problem, made, shift, two_sided=True, regression=True, residual=False):
    """What is wrong with the outputs, weighed by the gradients; made (out, in)."""
    wanted = (problem.dense if regression else problem.x).double() @ problem.wide.T
    wanted = wanted + problem.lost if residual else wanted
    wrong = wanted - problem.x.double() @ made.double().T - (0 if shift is None else shift)
    return mean_square(wrong @ root(damped_outputs(problem)) if two_sided else wrong)


def rank_beside_a_bias(shape, rank, storage):
    """The largest rank that together with a bias stores at most what `rank` stores without; 0 if there is none."""
    most = numbers_by_hand(shape, rank, storage, False)
    return max((k for k in range(1, rank + 1) if numbers_by_hand(shape, k, storage, True) <= most), default=0)


SWITCHES = list(product((True, False), repeat=3))


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize(("two_sided", "affine", "regression"), SWITCHES)
def test_each_part_of_ours_can_be_switched_off_and_the_rest_stays(shape, storage, two_sided, affine, regression, apart):
    problem = Problem(shape, apart=apart)
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
def test_a_bias_is_taken_only_where_it_loses_less_than_more_components(shape, storage):
    """The choice is the better of both on the data themselves, and never stores more than was planned."""
    taken = []
    for seed, apart, two_sided, regression in product(range(3), *3 * [(True, False)]):
        problem = Problem(shape, seed=seed)
        problem.x = problem.x - problem.x.mean(0).round() if apart else problem.x
        for rank in (2, 4, 6):
            seen = {"two_sided": two_sided, "regression": regression}
            asked = {"damping": 1e-9, "storage": storage, **seen}
            edit = problem.compress("paredown_lowrank", rank=rank, **asked)
            plain = problem.compress("paredown_lowrank", rank=rank, affine=False, **asked)
            less = rank_beside_a_bias(SHAPES[shape], rank, storage)
            made, shift = slow_paredown(problem, less, affine=True, damping=1e-9, **seen)
            lost = [data_loss(problem, e.dense(), e.shift, **seen) for e in (edit, plain)]
            assert lost[0] <= min(lost[1], data_loss(problem, made, shift, **seen)) * (1 + 1e-4)
            bias = 0 if edit.shift is None else len(edit.shift)
            assert edit.kept + bias <= plain.kept and edit.rank == (less if bias else rank)
            taken.append((regression, bool(bias)))
    assert (True, True) in taken and (True, False) in taken
    # the mean is one more direction of the second moment: a component that holds it loses no more than a bias
    assert (False, True) not in taken


def test_where_no_bias_fits_beside_rank_one_there_is_none():
    problem = Problem(apart=True)
    edit = problem.compress("paredown_lowrank", rank=1, storage="factors")
    assert edit.rank == 1 and edit.shift is None
    assert problem.compress("paredown_lowrank", rank=2, storage="factors").shift is not None


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("two_sided", [False, True])
def test_a_layer_that_writes_to_the_residual_stream_makes_up_for_what_it_lost(two_sided, affine, apart):
    problem, seen = Problem("wide", apart=apart), {"two_sided": two_sided, "residual": True, "regression": True}
    options = {"rank": 4, "two_sided": two_sided, "affine": affine, "storage": "factors"}
    method = build("paredown_lowrank", options)
    edit = method.compress(problem.weight, problem.stats(method).with_residual(problem.residual()))
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
def test_what_was_lost_stays_lost_where_the_option_says_so(off):
    problem, method = Problem(apart=True), build("paredown_lowrank", {"rank": 4, **off})
    stats = problem.stats(build("paredown_lowrank", {}))
    told = stats.with_residual(problem.residual())
    assert torch.equal(method.target(problem.weight, told).value, method.target(problem.weight, stats).value)
    made = torch.zeros_like(problem.wide)
    assert torch.equal(method.shift(problem.weight, made, told), method.shift(problem.weight, made, stats))


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_without_its_parts_is_another_paper_bit_for_bit(shape):
    problem, off = Problem(shape), {"two_sided": False, "affine": False, "regression": False, "storage": "factors"}
    for others, name in (({}, "svd_llm"), ({"affine": True}, "svd_llm"), ({"two_sided": True}, "fisher_svd")):
        mine = problem.compress("paredown_lowrank", rank=4, **{**off, **others})
        theirs = problem.compress(name, rank=4)
        assert all(torch.equal(mine.tensors[key], theirs.tensors[key]) for key in ("left", "right"))
        assert mine.loss == theirs.loss and mine.shift is theirs.shift is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_each_part_of_ours_earns_its_place_on_the_data(shape, seed):
    problem = Problem(shape, seed=seed, apart=True)

    def lost(**options):
        edit = problem.compress("paredown_lowrank", rank=4, damping=0.0, storage="factors", **options)
        return data_loss(problem, edit.dense(), edit.shift)

    whole = lost()
    for part in ("two_sided", "affine", "regression"):
        assert whole < lost(**{part: False})


@pytest.mark.parametrize("shape", SHAPES)
def test_no_affine_map_of_that_rank_is_nearer_to_the_dense_output_than_ours(shape):
    problem = Problem(shape, apart=True)
    weigh = root(damped_outputs(problem))
    edit = problem.compress("paredown_lowrank", rank=4, damping=0.0)
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
def test_a_survey_of_the_dense_model_aims_at_the_weight_itself(shape):
    problem, method = Problem(shape), build("paredown_lowrank", {"rank": 4})
    blind = InputStats(problem.weight.shape[1], frozenset({"gram", "mean"}))
    blind.update(problem.x)
    blind = blind.with_gradient(problem.gradient())
    assert torch.equal(method.target(problem.weight, blind).value, problem.wide)
    off = build("paredown_lowrank", {"rank": 4, "regression": False})
    assert torch.equal(method.losses(problem.weight, blind), off.losses(problem.weight, blind))


def test_the_regression_stays_off_though_both_streams_were_followed():
    problem = Problem()
    off = build("paredown_lowrank", {"rank": 4, "regression": False})
    paired = problem.stats(build("paredown_lowrank", {}))
    assert torch.equal(off.target(problem.weight, paired).value, problem.wide)


def test_laser_keeps_a_share_of_the_largest_rank_in_the_last_blocks():
    problem = Problem((24, 30))
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
    assert method.allocation == "per_type"
    curves = [Curve(f"layers.0.{part}_proj", (240, 240)) for part in "qkvo"]

    def largest(shape, numbers):
        return largest_rank(method.kind, shape, numbers)

    ranks = by_share(curves, 0.4, method.type_weights, largest, method.numbers)
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
def test_cur_keeps_rows_and_columns_of_the_weight_itself(shape):
    problem = Problem(shape)
    edit = problem.compress("cur", rank=4)
    score = torch.zeros_like(problem.wide)
    for i, j in product(*map(range, score.shape)):
        score[i, j] = abs(problem.weight[i, j]) * sqrt(float(problem.second[j, j]))
    u, _, vt = torch.linalg.svd(score, full_matrices=False)
    assert torch.equal(edit.tensors["columns"], problem.weight[:, naive_deim(vt[:4].T)])
    assert torch.equal(edit.tensors["rows"], problem.weight[naive_deim(u[:, :4])])
    assert edit.kind == "cur" and edit.kept == 4 * sum(problem.weight.shape) + 16


def parts(edit):
    return (edit.tensors[name].double() for name in ("columns", "link", "rows"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_weighted_link_is_the_least_squares_fit_of_the_outputs(shape, seed):
    problem = Problem(shape, seed=seed)
    columns, link, rows = parts(problem.compress("cur", rank=4))
    # every entry of the link is one unknown: what it alone adds to all outputs of all tokens
    hidden = problem.x.double() @ rows.T  # (tokens, rank)
    system = torch.einsum("oc,tr->tocr", columns, hidden).reshape(-1, 16)
    best = torch.linalg.lstsq(system, problem.outputs.reshape(-1, 1)).solution.reshape(4, 4)
    torch.testing.assert_close(link, best, rtol=0, atol=1e-4 * float(best.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_the_plain_link_is_the_fit_of_the_weight_and_costs_output(shape, seed):
    problem = Problem(shape, seed=seed)
    weighted, plain = (problem.compress("cur", rank=4, link=link) for link in ("gram", "plain"))
    columns, link, rows = parts(plain)
    wanted = torch.linalg.pinv(columns) @ problem.wide @ torch.linalg.pinv(rows)
    torch.testing.assert_close(link, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert all(torch.equal(weighted.tensors[part], plain.tensors[part]) for part in ("columns", "rows"))
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


def planted(out=24, inner=32, seed=0):
    """Low rank plus a few large entries: neither alone describes it."""
    problem = Problem((out, inner), seed=seed)
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
def test_sparse_and_low_rank_together_beat_each_alone(sparsity, seed):
    problem = planted(seed=seed)
    both = problem.compress("sparse_low_rank", sparsity=sparsity, rank=2)
    sparse = problem.compress("sparsegpt", sparsity=sparsity)
    low = problem.compress("svd_llm", rank=2)
    assert output_error(problem, both) < 0.5 * min(output_error(problem, sparse), output_error(problem, low))


@pytest.mark.parametrize("seed", range(3))
def test_sparse_and_low_rank_beat_each_alone_at_the_same_count_of_numbers(seed):
    problem = planted(seed=seed)
    both = problem.compress("sparse_low_rank", sparsity=0.8, rank=2)
    size = problem.weight.numel()
    sparse = problem.compress("sparsegpt", sparsity=1 - both.kept / size)
    low = problem.compress("svd_llm", rank=-(-both.kept // sum(problem.weight.shape)))
    assert abs(sparse.kept - both.kept) <= 1 <= low.kept - both.kept + 1
    assert output_error(problem, both) < 0.8 * min(output_error(problem, sparse), output_error(problem, low))


@pytest.mark.parametrize(("sparsity", "rank"), [(0.5, 2), (0.8, 5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_all_rounds_the_best_is_kept_and_later_ones_help(shape, sparsity, rank):
    # a single round may well be worse than the one before
    problem = Problem(shape)
    losses = [problem.compress("sparse_low_rank", sparsity=sparsity, rank=rank, rounds=r).loss for r in range(1, 9)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("sparsity", "kind"), [(0.37, "bitmap_lowrank"), ("2:4", "sparse24_lowrank"), ("1:4", "bitmap_lowrank")]
)
def test_sparse_and_low_rank_store_exactly_what_was_asked_for(sparsity, kind):
    problem = Problem()
    edit = problem.compress("sparse_low_rank", sparsity=sparsity, rank=2)
    removed = round(0.37 * 240) if sparsity == 0.37 else 240 - 240 * int(sparsity[0]) // 4
    assert edit.kind == kind and edit.rank == 2 and edit.kept == 240 - removed + 2 * 32
    sparse = kinds.kind_of(kind.removesuffix("_lowrank")).unpack(edit.tensors, (12, 20))
    assert int((sparse == 0).sum()) == removed
    torch.testing.assert_close(edit.dense(), sparse + edit.tensors["left"] @ edit.tensors["right"], rtol=0, atol=1e-5)
    spec = build("sparse_low_rank", {"sparsity": sparsity, "rank": 2}).spec((12, 20), 4)
    assert spec == edit.spec and edit.damping == 0.01


def test_sparse_plus_low_rank_refuses_a_width_that_groups_do_not_fit():
    problem = Problem((8, 10))
    with pytest.raises(PareError, match="divisible by 4"):
        problem.compress("sparse_low_rank", sparsity="2:4", rank=1)
    assert problem.compress("sparse_low_rank", sparsity=0.5, rank=1).dense().shape == (8, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_plus_low_rank_leaves_a_weight_dense_where_it_would_store_no_less(shape, sparsity, dtype):
    problem, (out, inner) = Problem(shape, dtype=dtype), SHAPES[shape]
    element, mask = problem.weight.element_size(), out * -(-inner // 8)  # 2 bits for each of half the weights, or 1
    numbers = 48 if sparsity == 0.8 else 120
    for rank in (1, 2, 3, 4, 5, 6, 12, 500):
        stored = (numbers + min(rank, 12) * 32) * element + mask
        edit = problem.compress("sparse_low_rank", sparsity=sparsity, rank=rank, rounds=1)
        spec = build("sparse_low_rank", {"sparsity": sparsity, "rank": rank}).spec((out, inner), element)
        assert (edit is None) == (spec is None) == (stored >= 240 * element)
        if edit is not None:
            assert sum(t.numel() * t.element_size() for t in edit.tensors.values()) == stored and edit.spec == spec


ASKED = {"kept": 0.5, "rank": 3, "energy": 0.9, "target_parameters": 1000}


@pytest.mark.parametrize("name", RANKED)
def test_how_much_is_kept_is_said_in_one_way(name):
    for one, two in product(ASKED, ASKED):
        if one < two:
            with pytest.raises(PareError, match=f"(?s)({one}.*{two}|{two}.*{one}).*one of them"):
                build(name, {one: ASKED[one], two: ASKED[two]})
    for one, value in ASKED.items():
        if (name, one) != ("cur", "energy"):
            assert getattr(build(name, {one: value}), one) == value
    assert build(name, {}).share == 0.8
    assert build(name, {"kept": 0.9}).with_rank(2) == build(name, {"rank": 2})
    assert build(name, {"target_parameters": 9}).with_share(0.3) == build(name, {"kept": 0.3})


@pytest.mark.parametrize("bad", [{"kept": 0}, {"kept": 1.0}, {"kept": 1.5}, {"rank": 0}, {"energy": 0}, {"energy": 1}, {"target_parameters": 0}, {"storage": "dense"}])  # fmt: skip
def test_what_cannot_be_kept_is_refused(bad):
    with pytest.raises(PareError, match=next(iter(bad))):
        build("svd_llm", bad)


def numbers_by_hand(shape, rank, storage, bias):
    out, inner = shape
    return rank * (out + inner) - (rank * rank if storage == "pifa" else 0) + (out if bias else 0)


@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize(
    ("name", "bias"), [("svd", False), ("svd_llm", False), ("rom", True), ("paredown_lowrank", False)]
)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 31)])
def test_kept_is_the_most_that_the_share_allows_with_the_bias_counted(shape, name, bias, storage):
    problem = Problem(shape)
    size = shape[0] * shape[1]
    for kept in (0.25, 0.4, 0.55, 0.7, 0.85, 0.95):
        edit = problem.compress(name, kept=kept, storage=storage)
        stored = sum(t.numel() for t in edit.tensors.values() if t.is_floating_point())
        assert edit.kept == stored
        if name == "paredown_lowrank" and edit.shift is not None:  # as many numbers as the plan, or a few less
            planned = build(name, {"kept": kept, "storage": storage}).planned_rank(shape)
            assert edit.rank == rank_beside_a_bias(shape, planned, storage)
            continue
        assert (edit.shift is not None) == bias
        assert stored + (shape[0] if bias else 0) == numbers_by_hand(shape, edit.rank, storage, bias) <= kept * size
        following = numbers_by_hand(shape, edit.rank + 1, storage, bias)
        assert following > kept * size or edit.rank + 1 > min(shape)


def test_where_not_even_rank_one_fits_the_message_says_what_to_do():
    problem = Problem()
    with pytest.raises(PareError, match=r"not even rank 1.*Raise kept, or skip it"):
        problem.compress("svd", kept=32 / 240 - 1e-6)
    assert problem.compress("svd", kept=32 / 240 + 1e-6).rank == 1
    with pytest.raises(PareError, match="not even rank 1"):  # the bias of the affine form is too much
        problem.compress("rom", kept=32 / 240 + 1e-6)


def test_a_share_that_is_met_exactly_is_allowed():
    assert build("svd", {"kept": 0.29}).planned_rank((4, 25)) == 1  # 29 numbers of 100


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("storage", ["factors", "pifa"])
def test_a_rank_that_pays_is_factored_and_any_larger_one_stays_dense(name, storage):
    problem, shape = Problem(), SHAPES["wide"]
    bias, method = name == "rom", build(name, {"storage": storage})
    pays = max(k for k in range(1, 13) if numbers_by_hand(shape, k, storage, bias) < 240)
    edit = problem.compress(name, rank=pays, storage=storage)
    if name == "paredown_lowrank" and edit.shift is not None:
        assert edit.rank == rank_beside_a_bias(shape, pays, storage)
    else:
        assert edit.rank == pays
    for rank in (pays + 1, 12, 13, 500):
        assert problem.compress(name, rank=rank, storage=storage) is None
        assert method.with_rank(rank).spec(shape, 2) is None


def test_cur_stays_dense_where_three_factors_store_no_less():
    problem = Problem()
    pays = max(k for k in range(1, 13) if k * 32 + k * k < 240)
    assert problem.compress("cur", rank=pays).rank == pays
    assert problem.compress("cur", rank=pays + 1) is None and problem.compress("cur", rank=50) is None


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in FACTORED if name != "laser"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy_is_the_least_rank_that_keeps_the_share_in_the_methods_own_metric(name, shape, energy):
    problem = Problem(shape)
    edit = problem.compress(name, energy=energy, storage="factors")
    method = build(name, {"affine": False} if name == "paredown_lowrank" else {})  # ours plans without a bias
    losses = method.losses(problem.weight, problem.stats(method))
    rank = next(k for k in range(1, 13) if float(losses[:k].sum()) >= energy * float(losses.sum()))
    if numbers_by_hand(SHAPES[shape], rank, "factors", method.adds_bias) >= 240:
        assert edit is None
        return
    assert edit.rank == rank
    if name != "paredown_lowrank":  # whose loss is a share of the weight's, not of the target's
        assert 1 - edit.loss >= energy - 1e-5
        if rank > 1:
            assert 1 - problem.compress(name, rank=rank - 1, storage="factors").loss < energy


def test_energy_that_takes_too_high_a_rank_stays_dense():
    assert Problem().compress("svd", energy=0.999) is None
    assert Problem().compress("svd", energy=0.97, storage="pifa").rank < 12


def test_a_target_for_the_whole_model_is_not_a_layer_s_business():
    for name in FACTORED:
        with pytest.raises(PareError, match="whole model"):
            Problem().compress(name, target_parameters=100)


def test_a_target_for_the_whole_model_is_no_business_of_a_layer_for_cur_either():
    with pytest.raises(PareError, match="whole model"):
        Problem().compress("cur", target_parameters=100)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_planned_is_what_is_stored(name, shape):
    problem = Problem(shape)
    for options in ({"kept": 0.6}, {"rank": 3}):
        method = build(name, options)
        edit, spec = problem.compress(name, **options), method.spec(SHAPES[shape], 4)
        assert spec == {**edit.spec, "bias": method.adds_bias}
        bias = 0 if edit.shift is None else len(edit.shift)
        assert kinds.stored_numbers(spec) == edit.kept + bias == method.numbers(SHAPES[shape], edit.rank)
        sizes = kinds.kind_of(edit.kind).sizes(spec)
        assert {key: tuple(t.shape) for key, t in edit.tensors.items()} == sizes
    for options in ({"energy": 0.5}, {"target_parameters": 100})[name == "cur" :]:
        assert build(name, options).spec(SHAPES[shape], 4) is None


def own_metric(problem, name, centred):
    """A (in, in) and G (out, out), without damping, and the weight that is aimed at."""
    gradient, delta, x = problem.gradient(), problem.delta.double(), problem.x.double()
    eye = torch.eye(len(problem.weight)).double()
    inputs = {
        "asvd": torch.diag(x.abs().mean(0)), "awsvd": torch.diag(x.square().mean(0)), "rom": problem.covariance,
        "lorap": torch.diag(x.square().mean(0)), "paredown_lowrank": problem.covariance if centred else problem.second,
        **dict.fromkeys(("svd", "fwsvd", "laser"), torch.eye(x.shape[1]).double()),
    }  # fmt: skip
    outputs = {"fwsvd": torch.diag(gradient["fisher_rows"])}
    outputs |= dict.fromkeys(("fisher_svd", "paredown_lowrank"), delta.T @ delta / len(delta))
    aim = problem.wide
    if name == "paredown_lowrank":
        dense, moment = problem.dense.double(), inputs[name]
        cross = dense.T @ x / len(x) - (torch.outer(problem.dense_mean, problem.mean) if centred else 0)
        added = 0.01 * moment.diagonal().mean() * torch.eye(x.shape[1]).double()
        aim = aim @ (cross + added) @ torch.linalg.inv(moment + added)
    return inputs.get(name, problem.second), outputs.get(name, eye), aim


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_told_is_the_weighted_one_as_a_share_of_dropping_the_weight(name, shape, apart):
    problem = Problem(shape, apart=apart)
    edit = problem.compress(name, rank=3, **ALL[name])
    a, g, aim = own_metric(problem, name, edit.shift is not None)
    wrong = aim - edit.dense().double()
    share = torch.einsum("ab,bc,cd,ad->", g, wrong, a, wrong) / torch.einsum(
        "ab,bc,cd,ad->", g, problem.wide, a, problem.wide
    )
    assert edit.loss == pytest.approx(float(share), rel=1e-5)
    assert edit.told["measured_loss"] == edit.loss and edit.told["rank"] == edit.rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["svd_llm", "rom", "fisher_svd", "paredown_lowrank", "cur", "sparse_low_rank"])
def test_the_relative_error_is_the_mean_square_over_the_data_bias_included(name, shape, dtype):
    problem, method = Problem(shape, dtype=dtype), build(name, {"rank": 3, **ALL[name]})
    stats = problem.stats(method)
    edit = method.compress(problem.weight, stats)
    wrong = total = 0.0
    for token in problem.x.double():
        made = edit.dense().double() @ token + (0 if edit.shift is None else edit.shift)
        wrong += float((problem.wide @ token - made).square().sum())
        total += float((problem.wide @ token).square().sum())
    assert edit.relative_error(problem.weight, stats) == pytest.approx(wrong / total, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "storage"),
    [*product(FACTORED, ({"storage": "factors"}, {"storage": "pifa"})), ("cur", {}), ("sparse_low_rank", {})],
)
def test_every_dtype_is_kept_and_loses_little_more(name, storage, dtype):
    options = {"rank": 3, **ALL[name], **storage}
    problem = Problem(dtype=dtype)
    edit = problem.compress(name, **options)
    floats = [t for t in edit.tensors.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {edit.dense().dtype} == {dtype}
    assert all(torch.isfinite(t).all() for t in floats)
    assert edit.shift is None or edit.shift.dtype == torch.float64
    wide = Problem()
    wide.weight, wide.wide = problem.weight.float(), problem.wide
    # of two nearly equal entries rounding may drop the other one
    within = 0.1 if name == "sparse_low_rank" else 0.02
    assert edit.loss == pytest.approx(wide.compress(name, **options).loss, rel=within)


@pytest.mark.parametrize("name", ALL)
def test_compress_changes_neither_the_weight_nor_the_statistics(name):
    problem, method = Problem(), build(name, {"rank": 3, **ALL[name]})
    stats, weight = problem.stats(method), problem.weight.clone()
    sums = {key: total.clone() for key, total in stats._sums.items()}
    one, two = method.compress(problem.weight, stats), method.compress(problem.weight, stats)
    assert torch.equal(problem.weight, weight) and all(torch.equal(stats._sums[key], sums[key]) for key in sums)
    assert all(torch.equal(one.tensors[key], two.tensors[key]) for key in one.tensors) and one.loss == two.loss


@pytest.mark.parametrize("name", ["fwsvd", "fisher_svd", "paredown_lowrank"])
def test_a_gradient_that_was_not_collected_is_asked_for_by_name(name):
    problem, method = Problem(), build(name, {"rank": 3})
    with pytest.raises(RuntimeError, match="not collected"):
        method.compress(problem.weight, problem.inputs(method))


@pytest.mark.parametrize("name", [name for name in ALL if name != "paredown_lowrank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_inputs_and_dead_inputs_are_ordinary(name, shape):
    problem = Problem(shape, tokens=4, sequences=2)
    problem.x[:, :3] = 0
    edit = problem.compress(name, rank={"cur": 4, "sparse_low_rank": 3}.get(name, 5), **ALL[name])
    assert torch.isfinite(edit.dense()).all() and 0 <= edit.loss < 1
    if name in ("svd_llm", "rom"):  # four tokens span four outputs
        assert edit.loss < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_takes_fewer_tokens_than_inputs_too(shape):
    problem = Problem(shape, tokens=4, sequences=2)
    problem.x[:, :3] = 0
    edit = problem.compress("paredown_lowrank", rank=5)
    made = problem.x.double() @ edit.dense().double().T + (0 if edit.shift is None else edit.shift)
    wanted = problem.dense.double() @ problem.wide.T
    assert torch.isfinite(edit.dense()).all() and mean_square(made - wanted) < 0.05 * mean_square(wanted)


def test_ours_takes_inputs_that_never_change():
    problem = Problem()
    problem.x[:], problem.dense[:] = 1, 1
    assert torch.isfinite(problem.compress("paredown_lowrank", rank=5).dense()).all()


def test_a_weight_of_zeros_stays_zero():
    for name, options in ALL.items():
        problem = Problem()
        problem.weight.zero_()
        problem.wide.zero_()
        edit = problem.compress(name, rank=3, **options)
        assert (
            not edit.dense().any()
            and edit.loss == 0
            and edit.relative_error(problem.weight, problem.stats(build(name, {}))) == 0
        )


def beyond_float16():
    """Its best rank 1 is 1.17 times its largest entry."""
    problem = Problem((8, 8))
    block = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    problem.weight = (6e4 * block).half()
    problem.wide = problem.weight.double()
    return problem


def test_values_that_float16_cannot_hold_are_refused_by_name():
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        beyond_float16().compress("svd", rank=1, storage="pifa")  # a pivot
    tiny = Problem(dtype=torch.float16)
    tiny.weight = tiny.weight * 1e-6
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        tiny.compress("cur", rank=4)  # the link is as large as the weight is small
    twins = Problem((8, 8))
    twins.x[:, 1::2] = twins.x[:, ::2]
    signs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).sign()
    twins.weight = (6e4 * signs).repeat_interleave(2, 1).half()
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        twins.compress("sparse_low_rank", rank=1, sparsity="2:4")  # one of two equal inputs takes over both weights
    for problem, name, options in (
        (beyond_float16(), "svd", {"storage": "pifa"}),
        (tiny, "cur", {}),
        (twins, "sparse_low_rank", {}),
    ):
        problem.weight = problem.weight.bfloat16()
        assert torch.isfinite(problem.compress(name, rank=1, **options).dense()).all()


def test_a_product_that_float16_cannot_hold_is_refused_too():
    with pytest.raises(PareError, match="float16 cannot hold"):
        beyond_float16().compress("svd", rank=1)
