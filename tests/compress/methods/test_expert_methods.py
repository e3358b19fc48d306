"""Each score against its formula, written as slow loops, and what stays of equal ones."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.methods import METHODS
from paredown.compress.methods.base import Group
from paredown.compress.methods.structured.experts import Experts, ExpertStats

NAMES = ["reap", "man", "expert_frequency", "aimer", "random_experts", "magnitude_experts", "paredown_experts"]


def case(count=6):
    draw = torch.Generator().manual_seed(0)
    weights = {
        "gate_up": torch.randn(count, 10, 4, generator=draw) ** 3,
        "down": torch.randn(count, 4, 5, generator=draw),
    }
    logits = torch.randn(40, count, generator=draw, dtype=torch.float64)
    stats = ExpertStats(*(torch.rand(3, count, generator=draw, dtype=torch.float64)), logits.T @ logits)
    channels = (weights["gate_up"][:, :5], weights["gate_up"][:, 5:], weights["down"].transpose(1, 2))
    group = Group("model.layers.0.mlp", "experts", count, (), "", "num_experts")
    return Experts(group, weights, stats, channels)


def method(name, **options):
    return METHODS.build(name, {"units": 2, **options})


@pytest.mark.parametrize(("name", "field"), [("reap", "gated"), ("man", "norm"), ("expert_frequency", "count")])
def test_the_experts_with_the_highest_means_stay(name, field):
    experts = case()
    keep = method(name).compress(experts, 2).keep
    ranked = sorted(range(6), key=lambda e: -float(getattr(experts.stats, field)[e]))
    assert keep.nonzero()[:, 0].tolist() == sorted(ranked[:2])


def test_aimer_is_the_absolute_mean_over_the_root_mean_square_of_all_matrices_and_the_highest_go():
    experts = case()
    scores = []
    for e in range(6):
        numbers = [float(v) for weight in experts.weights.values() for v in weight[e].flatten()]
        absolute = sum(abs(v) for v in numbers) / len(numbers)
        scores.append(absolute / math.sqrt(sum(v * v for v in numbers) / len(numbers)))
    torch.testing.assert_close(-method("aimer").scores(experts), torch.tensor(scores, dtype=torch.float64))
    keep = method("aimer").compress(experts, 2).keep
    assert keep.nonzero()[:, 0].tolist() == sorted(sorted(range(6), key=lambda e: scores[e])[:2])


def test_magnitude_is_the_norm_of_all_matrices_and_the_sum_over_tokens_is_the_mean_times_their_number():
    experts = case()
    norms = [math.sqrt(sum(float(v) ** 2 for w in experts.weights.values() for v in w[e].flatten())) for e in range(6)]
    torch.testing.assert_close(method("magnitude_experts").scores(experts), torch.tensor(norms, dtype=torch.float64))
    sums = experts.stats.count * experts.stats.gated
    assert torch.equal(method("paredown_experts").scores(experts), sums)


def test_an_expert_of_zeros_is_the_first_that_aimer_removes():
    experts = case()
    for weight in experts.weights.values():
        weight[3] = 0
    assert not method("aimer").compress(experts, 5).keep[3]


@pytest.mark.parametrize("name", NAMES)
def test_as_many_stay_as_are_asked_for_and_what_is_read_is_left_alone(name):
    experts = case()
    before = {key: weight.clone() for key, weight in experts.weights.items()}
    for keep in (1, 3, 6):
        cut = method(name).compress(experts, keep)
        assert int(cut.keep.sum()) == keep and cut.weight is cut.shift is cut.into is None
    assert all(torch.equal(weight, before[key]) for key, weight in experts.weights.items())


def test_of_equal_experts_the_first_stay():
    experts = case()
    experts.stats.count.fill_(1)
    assert method("expert_frequency").compress(experts, 2).keep.tolist() == [True] * 2 + [False] * 4


def test_a_seed_draws_the_same_experts_again_and_another_one_others():
    draws = [method("random_experts", seed=seed).compress(case(32), 8).keep for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_scores_that_are_no_numbers_are_refused_by_name():
    experts = case()
    experts.stats.gated[1] = torch.nan
    with pytest.raises(PareError, match=r"experts of model\.layers\.0\.mlp give numbers that are not finite"):
        method("reap").compress(experts, 2)


@pytest.mark.parametrize("name", [*NAMES, "mc_smoe"])
def test_kept_and_units_are_of_experts_one_at_a_time(name):
    built = METHODS.build(name, {"kept": 0.5})
    assert built.kind == "experts" and built.of_units and built.multiple == 1
    with pytest.raises(PareError, match="how many units stay is not said"):
        METHODS.build(name, {})


def permutations_of(channels):
    return (list(order) for order in itertools.permutations(range(channels)))


def test_experts_that_go_join_the_dominant_one_with_the_nearest_logits_aligned_by_their_weights():
    experts = case()
    cut = method("mc_smoe").compress(experts, 3)
    stats, (gate, up, down) = experts.stats, experts.channels
    dominant = sorted(range(6), key=lambda e: -float(stats.count[e]))[:3]
    assert cut.keep.nonzero()[:, 0].tolist() == sorted(dominant) and torch.equal(cut.weights, stats.count)
    for e in range(6):
        if e in dominant:
            assert cut.into[e] == e and cut.order[e].tolist() == list(range(5))
            continue
        cosine = [float(stats.logits[e, d] / (stats.logits[e, e] * stats.logits[d, d]).sqrt()) for d in dominant]
        to = dominant[cosine.index(max(cosine))]
        best = max(
            permutations_of(5), key=lambda order: sum(float((t[to] * t[e][order]).sum()) for t in (gate, up, down))
        )
        assert cut.into[e] == to and cut.order[e].tolist() == best


def test_an_expert_and_itself_in_another_order_become_itself():
    experts = case(2)
    order = [3, 0, 4, 1, 2]
    gate_up, down = experts.weights["gate_up"], experts.weights["down"]
    gate_up[1], down[1] = torch.cat([gate_up[0, :5][order], gate_up[0, 5:][order]]), down[0][:, order]
    experts.stats.count.copy_(torch.tensor([2.0, 1.0]))
    cut = method("mc_smoe").compress(experts, 1)
    assert torch.equal(gate_up[1, :5][cut.order[1]], gate_up[0, :5]) and torch.equal(down[1][:, cut.order[1]], down[0])


def test_experts_whose_hidden_channels_are_not_known_are_not_merged():
    with pytest.raises(
        PareError, match=r"model\.layers\.0\.mlp: the hidden channels of its experts cannot be told.*reap"
    ):
        method("mc_smoe").compress(replace(case(), channels=()), 2)
