"""What all low-rank methods promise of their options, and of what they are given and give back."""

from dataclasses import replace
from itertools import product
from math import isnan

import pytest
import torch
from oracles import SHAPES, numbers_by_hand

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS, build
from paredown.compress.methods.lowrank.base import Factorized
from paredown.compress.numerics.factorize import spectrum
from paredown.compress.numerics.moments import Stats
from paredown.compress.storage import kinds

# methods that store factors of what one metric calls the best, with a small option or two
FACTORED = {
    "svd": {}, "fwsvd": {}, "asvd": {}, "awsvd": {}, "svd_llm": {}, "rom": {}, "fisher_svd": {}, "paredown_lowrank": {},
    "laser": {}, "lorap": {},
}  # fmt: skip
RANKED = {**FACTORED, "cur": {}}
ALL = {**RANKED, "sparse_low_rank": {"rounds": 2}, "paredown_lowrank": {"affine": True}}


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
    # where nothing is asked for: of these two each layer's own rule
    assert build(name, {}).share == (None if name in ("cur", "laser") else 0.8)
    assert build(name, {"kept": 0.9}).at(2) == build(name, {"rank": 2})
    assert replace(build(name, {"target_parameters": 9}), kept=0.3, target_parameters=None) == build(
        name, {"kept": 0.3}
    )


@pytest.mark.parametrize("bad", [{"kept": 0}, {"kept": 1.0}, {"kept": 1.5}, {"rank": 0}, {"energy": 0}, {"energy": 1}, {"target_parameters": 0}, {"storage": "dense"}])  # fmt: skip
def test_what_cannot_be_kept_is_refused(bad):
    with pytest.raises(PareError, match=next(iter(bad))):
        build("svd_llm", bad)


@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize(
    ("name", "bias"), [("svd", False), ("svd_llm", False), ("rom", True), ("paredown_lowrank", False)]
)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (9, 31)])
def test_kept_is_the_most_that_the_share_allows_with_the_bias_counted(shape, name, bias, storage, lowrank_problem):
    problem = lowrank_problem(shape)
    size = shape[0] * shape[1]
    for kept in (0.25, 0.4, 0.55, 0.7, 0.85, 0.95):
        edit = problem.compress(name, kept=kept, storage=storage)
        stored = sum(t.numel() for t in edit.parts.values() if t.is_floating_point())
        assert edit.numbers == stored
        assert (edit.shift is not None) == bias
        assert stored + (shape[0] if bias else 0) == numbers_by_hand(shape, edit.rank, storage, bias) <= kept * size
        following = numbers_by_hand(shape, edit.rank + 1, storage, bias)
        assert following > kept * size or edit.rank + 1 > min(shape)


def test_where_not_even_rank_one_fits_the_message_says_what_to_do(lowrank_problem):
    problem = lowrank_problem()
    with pytest.raises(PareError, match=r"not even rank 1.*Raise kept, or skip it"):
        problem.compress("svd", kept=32 / 240 - 1e-6)
    assert problem.compress("svd", kept=32 / 240 + 1e-6).rank == 1
    with pytest.raises(PareError, match=r"not even rank 600 .*rank_multiple"):
        build("svd", {"kept": 0.9, "rank_multiple": 600}).expect((512, 1024), 2)
    with pytest.raises(PareError, match="not even rank 1"):  # the bias of the affine form is too much
        problem.compress("rom", kept=32 / 240 + 1e-6)


def test_a_share_that_is_met_exactly_is_allowed():
    assert build("svd", {"kept": 0.29}).planned_rank((4, 25)) == 1  # 29 numbers of 100


@pytest.mark.parametrize("name", FACTORED)
@pytest.mark.parametrize("storage", ["factors", "pifa"])
def test_a_rank_that_pays_is_factored_and_any_larger_one_stays_dense(name, storage, lowrank_problem):
    problem, shape = lowrank_problem(), SHAPES["wide"]
    bias, method = name == "rom", build(name, {"storage": storage})
    pays = max(k for k in range(1, 13) if numbers_by_hand(shape, k, storage, bias) < 240)
    edit = problem.compress(name, rank=pays, storage=storage)
    assert edit.rank == pays
    for rank in (pays + 1, 12, 13, 500):
        assert problem.compress(name, rank=rank, storage=storage) is None
        assert method.at(rank).expect(shape, 2) is None


def test_cur_stays_dense_where_three_factors_store_no_less(lowrank_problem):
    problem = lowrank_problem()
    pays = max(k for k in range(1, 13) if k * 32 + k * k < 240)
    assert problem.compress("cur", rank=pays).rank == pays
    assert problem.compress("cur", rank=pays + 1) is None and problem.compress("cur", rank=50) is None


def test_sparse_plus_low_rank_refuses_a_width_that_groups_do_not_fit(lowrank_problem):
    problem = lowrank_problem((8, 10))
    with pytest.raises(PareError, match="divisible by 4"):
        problem.compress("sparse_low_rank", sparsity="2:4", rank=1)
    assert problem.compress("sparse_low_rank", sparsity=0.5, rank=1).dense().shape == (8, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_plus_low_rank_leaves_a_weight_dense_where_it_would_store_no_less(
    shape, sparsity, dtype, lowrank_problem
):
    problem, (out, inner) = lowrank_problem(shape, dtype=dtype), SHAPES[shape]
    # one bit per weight; of 2:4 two for each of half the weights, in whole blocks of 64 columns
    element, mask = problem.weight.element_size(), out * (8 * -(-inner // 64) if sparsity == "2:4" else -(-inner // 8))
    numbers = 48 if sparsity == 0.8 else 120
    for rank in (1, 2, 3, 4, 5, 6, 12, 500):
        stored = (numbers + min(rank, 12) * 32) * element + mask
        edit = problem.compress("sparse_low_rank", sparsity=sparsity, rank=rank, rounds=1)
        spec = build("sparse_low_rank", {"sparsity": sparsity, "rank": rank}).expect((out, inner), element)
        assert (edit is None) == (spec is None) == (stored >= 240 * element)
        if edit is not None:
            assert sum(t.numel() * t.element_size() for t in edit.parts.values()) == stored and edit.spec() == spec


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [name for name in FACTORED if name != "laser"])
@pytest.mark.parametrize("energy", [0.3, 0.6, 0.9])
def test_energy_is_the_least_rank_that_keeps_the_share_in_the_methods_own_metric(name, shape, energy, lowrank_problem):
    problem = lowrank_problem(shape)
    edit = problem.compress(name, energy=energy, storage="factors")
    method = build(name, {})
    stats = problem.stats(method)
    losses = spectrum(method.target(problem.weight, stats), method.metric(stats))
    rank = next(k for k in range(1, 13) if float(losses[:k].sum()) >= energy * float(losses.sum()))
    if numbers_by_hand(SHAPES[shape], rank, "factors", method.adds_bias) >= 240:
        assert edit is None
        return
    assert edit.rank == rank
    if name != "paredown_lowrank":  # whose loss is a share of the weight's, not of the target's
        assert 1 - edit.loss >= energy - 1e-5
        if rank > 1:
            assert 1 - problem.compress(name, rank=rank - 1, storage="factors").loss < energy


def test_energy_that_takes_too_high_a_rank_stays_dense(lowrank_problem):
    assert lowrank_problem().compress("svd", energy=0.999) is None
    assert lowrank_problem().compress("svd", energy=0.97, storage="pifa").rank < 12


def test_a_target_for_the_whole_model_is_not_a_layer_s_business(lowrank_problem):
    for name in FACTORED:
        with pytest.raises(PareError, match="whole model"):
            lowrank_problem().compress(name, target_parameters=100)


def test_a_target_for_the_whole_model_is_no_business_of_a_layer_for_cur_either(lowrank_problem):
    with pytest.raises(PareError, match="whole model"):
        lowrank_problem().compress("cur", target_parameters=100)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_planned_is_what_is_stored(name, shape, lowrank_problem):
    problem = lowrank_problem(shape)
    for options in ({"kept": 0.6}, {"rank": 3}):
        method = build(name, options)
        edit, spec = problem.compress(name, **options), method.expect(SHAPES[shape], 4)
        assert spec == replace(edit.spec(), bias=method.adds_bias)
        bias = 0 if edit.shift is None else len(edit.shift)
        assert kinds.stored_numbers(spec) == edit.numbers + bias == method.numbers(SHAPES[shape], edit.rank)
        sizes = kinds.kind_of(edit.kind).sizes(spec)
        assert {key: tuple(t.shape) for key, t in edit.parts.items()} == sizes
    for options in ({"energy": 0.5}, {"target_parameters": 100})[name == "cur" :]:
        assert build(name, options).expect(SHAPES[shape], 4) is None


def test_these_are_all_low_rank_methods_of_the_package():
    classes = {name: cls for name, cls in METHODS.classes().items() if cls.__module__.startswith("paredown.compress")}
    assert {name for name, cls in classes.items() if issubclass(cls, Factorized)} == set(RANKED)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_choice_is_what_the_method_at_it_expects_to_store(name, storage, shape, lowrank_problem):
    if name == "cur" and storage == "pifa":
        pytest.skip("cur has a storage of its own")
    problem, method = lowrank_problem(shape), build(name, {"storage": storage})
    stats = problem.stats(method)
    nothing, *choices = method.choices(SHAPES[shape], problem.weight, stats)
    assert nothing.numbers == 0 and nothing.option is None
    losses = [choice.loss for choice in (nothing, *choices)]
    assert losses == sorted(losses, reverse=True) and losses[-1] >= 0
    for choice in choices:
        spec = method.at(choice.option).expect(SHAPES[shape], 4)
        assert spec.rank == choice.option and kinds.stored_numbers(spec) == choice.numbers < problem.weight.numel()
        edit = method.at(choice.option).compress(problem.weight, stats)
        bias = 0 if edit.shift is None else len(edit.shift)
        assert edit.numbers + bias <= choice.numbers and edit.rank == choice.option
    offered = [choice.option for choice in choices]
    assert offered == [k for k in range(1, 13) if method.at(k).expect(SHAPES[shape], 4)]
    by_shape = method.choices(SHAPES[shape])
    assert [(c.numbers, c.option) for c in by_shape] == [(c.numbers, c.option) for c in (nothing, *choices)]
    assert all(isnan(choice.loss) for choice in by_shape)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("step", [16, 32, 1])
def test_of_a_large_weight_only_whole_steps_are_choices(name, step):
    shape, method = (512, 1024), build(name, {} if step == 16 else {"rank_multiple": step})
    ranks = [choice.option for choice in method.choices(shape)[1:]]
    assert ranks == list(range(step, ranks[-1] + 1, step)) and method.at(ranks[-1]).expect(shape, 2).rank == ranks[-1]
    assert method.at(ranks[-1] + step).expect(shape, 2) is None or ranks[-1] + step > 512
    if name not in ("cur", "laser"):
        following = build(name, {"kept": 0.7, "rank_multiple": 1}).expect(shape, 2).rank
        assert build(name, {"kept": 0.7, "rank_multiple": step}).expect(shape, 2).rank == following // step * step


def test_sparse_plus_low_rank_offers_nothing_to_allocate(lowrank_problem):
    problem, method = lowrank_problem(), build("sparse_low_rank", {"rank": 2})
    assert method.choices((12, 20), problem.weight, problem.stats(method)) == [] and method.strategy is None


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
        added = 0.3 * torch.diag(moment.diagonal())
        aim = aim @ (cross + added) @ torch.linalg.inv(moment + added)
    return inputs.get(name, problem.second), outputs.get(name, eye), aim


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("apart", [False, True])
def test_the_loss_told_is_the_weighted_one_as_a_share_of_dropping_the_weight(name, shape, apart, lowrank_problem):
    problem = lowrank_problem(shape, apart=apart)
    edit = problem.compress(name, rank=3, **ALL[name])
    a, g, aim = own_metric(problem, name, edit.shift is not None)
    wrong = aim - edit.dense().double()
    share = torch.einsum("ab,bc,cd,ad->", g, wrong, a, wrong) / torch.einsum(
        "ab,bc,cd,ad->", g, problem.wide, a, problem.wide
    )
    assert edit.loss == pytest.approx(float(share), rel=1e-5)
    assert edit.facts["measured_loss"] == edit.loss and edit.facts["rank"] == edit.rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["svd_llm", "rom", "fisher_svd", "paredown_lowrank", "cur", "sparse_low_rank"])
def test_the_relative_error_is_the_mean_square_over_the_data_bias_included(name, shape, dtype, lowrank_problem):
    problem, method = lowrank_problem(shape, dtype=dtype), build(name, {"rank": 3, **ALL[name]})
    stats = problem.stats(method)
    edit = method.compress(problem.weight, stats)
    wrong = total = 0.0
    for token in problem.x.double():
        made = edit.dense().double() @ token + (0 if edit.shift is None else edit.shift)
        wrong += float((problem.wide @ token - made).square().sum())
        total += float((problem.wide @ token).square().sum())
    assert edit.relative_error(problem.weight, stats.inputs) == pytest.approx(wrong / total, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "storage"),
    [*product(FACTORED, ({"storage": "factors"}, {"storage": "pifa"})), ("cur", {}), ("sparse_low_rank", {})],
)
def test_every_dtype_is_kept_and_loses_little_more(name, storage, dtype, lowrank_problem):
    options = {"rank": 3, **ALL[name], **storage}
    problem = lowrank_problem(dtype=dtype)
    edit = problem.compress(name, **options)
    floats = [t for t in edit.parts.values() if t.is_floating_point()]
    assert {t.dtype for t in floats} == {edit.dense().dtype} == {dtype}
    assert all(torch.isfinite(t).all() for t in floats)
    assert edit.shift is None or edit.shift.dtype == torch.float64
    wide = lowrank_problem()
    wide.weight, wide.wide = problem.weight.float(), problem.wide
    # of two nearly equal entries rounding may drop the other one
    within = 0.1 if name == "sparse_low_rank" else 0.02
    assert edit.loss == pytest.approx(wide.compress(name, **options).loss, rel=within)


def contents(stats):
    """All that is known of a layer, copied."""
    moments = [getattr(stats.inputs, need) for need in sorted(stats.inputs.needs)]
    return [moment.clone() for moment in (*moments, *stats.gradients.values())]


@pytest.mark.parametrize("name", ALL)
def test_compress_changes_neither_the_weight_nor_the_statistics(name, lowrank_problem):
    problem, method = lowrank_problem(), build(name, {"rank": 3, **ALL[name]})
    stats, weight = problem.stats(method), problem.weight.clone()
    before = contents(stats)
    one, two = method.compress(problem.weight, stats), method.compress(problem.weight, stats)
    assert torch.equal(problem.weight, weight) and all(map(torch.equal, contents(stats), before))
    assert all(torch.equal(one.parts[key], two.parts[key]) for key in one.parts) and one.loss == two.loss


@pytest.mark.parametrize("name", ["fwsvd", "fisher_svd", "paredown_lowrank"])
def test_a_gradient_that_was_not_collected_is_asked_for_by_name(name, lowrank_problem):
    problem, method = lowrank_problem(), build(name, {"rank": 3})
    with pytest.raises(RuntimeError, match="not collected"):
        method.compress(problem.weight, Stats(problem.inputs(method)))


@pytest.mark.parametrize("name", [name for name in ALL if name != "paredown_lowrank"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_inputs_and_dead_inputs_are_ordinary(name, shape, lowrank_problem):
    problem = lowrank_problem(shape, tokens=4, sequences=2)
    problem.x[:, :3] = 0
    edit = problem.compress(name, rank={"cur": 4, "sparse_low_rank": 3}.get(name, 5), **ALL[name])
    assert torch.isfinite(edit.dense()).all() and 0 <= edit.loss < 1
    if name in ("svd_llm", "rom"):  # four tokens span four outputs
        assert edit.loss < 1e-9


def test_a_weight_of_zeros_stays_zero(lowrank_problem):
    for name, options in ALL.items():
        problem = lowrank_problem()
        problem.weight.zero_()
        problem.wide.zero_()
        edit = problem.compress(name, rank=3, **options)
        assert (
            not edit.dense().any()
            and edit.loss == 0
            and edit.relative_error(problem.weight, problem.inputs(build(name, {}))) == 0
        )


def beyond_float16(lowrank_problem):
    """Its best rank 1 is 1.17 times its largest entry."""
    problem = lowrank_problem((8, 8))
    block = torch.tensor([[1.0, 1.0], [1.0, 0.0]]).repeat_interleave(4, 0).repeat_interleave(4, 1)
    problem.weight = (6e4 * block).half()
    problem.wide = problem.weight.double()
    return problem


def test_values_that_float16_cannot_hold_are_refused_by_name(lowrank_problem):
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        beyond_float16(lowrank_problem).compress("svd", rank=1, storage="pifa")  # a pivot
    tiny = lowrank_problem(dtype=torch.float16)
    tiny.weight = tiny.weight * 1e-6
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        tiny.compress("cur", rank=4)  # the link is as large as the weight is small
    twins = lowrank_problem((8, 64))
    twins.x[:, 1::2] = twins.x[:, ::2]
    signs = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).sign()
    twins.weight = (6e4 * signs).repeat_interleave(2, 1).half()
    with pytest.raises(PareError, match=r"float16 cannot hold.*float32"):
        twins.compress("sparse_low_rank", rank=1, sparsity="2:4")  # one of two equal inputs takes over both weights
    for problem, name, options in (
        (beyond_float16(lowrank_problem), "svd", {"storage": "pifa"}),
        (tiny, "cur", {}),
        (twins, "sparse_low_rank", {}),
    ):
        problem.weight = problem.weight.bfloat16()
        assert torch.isfinite(problem.compress(name, rank=1, **options).dense()).all()


def test_a_product_that_float16_cannot_hold_is_refused_too(lowrank_problem):
    with pytest.raises(PareError, match="float16 cannot hold"):
        beyond_float16(lowrank_problem).compress("svd", rank=1)


@pytest.mark.parametrize("storage", ["factors", "pifa"])
@pytest.mark.parametrize("name", ALL)
def test_weights_and_inputs_of_any_low_rank_are_compressed_to_finite_numbers(name, storage, lowrank_problem):
    options = {"kept": 0.9, "storage": storage} if name in FACTORED else ALL[name]
    if storage == "pifa" and name not in FACTORED:
        return
    method = build(name, options)
    for shape in SHAPES:
        problem = lowrank_problem(shape, tokens=40)
        weight, x = problem.weight, problem.x
        one = torch.outer(weight[:, 0], weight[0])
        dead = x.clone()
        dead[:, 0] = 0
        for problem.weight in (torch.zeros_like(weight), one, torch.ones_like(weight), weight.bfloat16()):
            for problem.x in (x, torch.zeros_like(x), dead, x[:1].expand_as(x).contiguous(), torch.ones_like(x)):
                problem.dense = problem.x
                problem.wide = problem.weight.double()
                stats = problem.stats(method)
                edit = method.compress(problem.weight, stats)
                if edit is not None:
                    error = edit.relative_error(problem.weight, stats.inputs)
                    assert torch.isfinite(edit.dense()).all() and not isnan(error)
                    if problem.weight is not weight and name == "svd" and problem.weight[0, 0] in (0, 1):
                        torch.testing.assert_close(edit.dense(), problem.weight, rtol=1e-4, atol=1e-5)
