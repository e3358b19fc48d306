"""Divergences of two models' predictions against their formulas written out in float64."""

import math
from itertools import pairwise

import pytest
import torch

from paredown.compress.numerics.divergence import TokenDivergence, divergence, token_divergence


def by_loops(a, b):
    """KL, Jensen-Shannon and agreement of two rows of logits."""
    p, q = (math_softmax(row.double().tolist()) for row in (a, b))
    m = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    kl = distance(p, q)
    return kl, (distance(p, m) + distance(q, m)) / 2, p.index(max(p)) == q.index(max(q))


def math_softmax(row):
    powers = [math.exp(x - max(row)) for x in row]
    return [x / math.fsum(powers) for x in powers]


def distance(p, q):
    return math.fsum(x * math.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("chunk", [1, 4 * 50 * 3, 1 << 20])
def test_each_token_is_what_slow_loops_in_float64_say(scale, chunk):
    torch.manual_seed(0)
    a = torch.randn(2, 5, 50) * 3
    b = a + torch.randn(2, 5, 50) * scale + 7  # what is added to all logits changes nothing
    found = token_divergence(a, b, chunk)
    for row in range(2):
        for at in range(5):
            kl, js, same = by_loops(a[row, at], b[row, at])
            assert found.kl[row, at].item() == pytest.approx(kl, abs=1e-6, rel=1e-5)
            assert found.js[row, at].item() == pytest.approx(js, abs=1e-6)
            assert found.same_top[row, at].item() == same


def test_divergence_is_nothing_for_equal_models_and_js_at_most_ln_2():
    torch.manual_seed(0)
    a = torch.randn(1, 4, 30)
    same = token_divergence(a, a.clone())
    assert same.kl.max() < 1e-7 and same.js.max() < 1e-7 and same.same_top.all()
    opposite = torch.zeros(1, 2, 30)
    opposite[0, :, 3] = 200.0
    other = torch.zeros(1, 2, 30)
    other[0, :, 9] = 200.0
    apart = token_divergence(opposite, other)
    assert (apart.js <= math.log(2)).all() and apart.js.min() == pytest.approx(math.log(2))
    assert apart.kl.min() == pytest.approx(200.0) and not apart.same_top.any()


def test_a_token_that_both_models_mask_counts_for_nothing():
    torch.manual_seed(0)
    a, b = torch.randn(1, 3, 20), torch.randn(1, 3, 20)
    expected = token_divergence(a, b)
    for masked in (-math.inf, torch.finfo(torch.float32).min):
        wide = [torch.cat([x, torch.full((1, 3, 2), masked)], -1) for x in (a, b)]
        for ours, theirs in zip(token_divergence(*wide), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_half_precision_logits_are_widened_before_they_are_compared():
    torch.manual_seed(0)
    a, b = torch.randn(1, 3, 4000).bfloat16(), torch.randn(1, 3, 4000).bfloat16()
    for ours, theirs in zip(token_divergence(a, b), token_divergence(a.float(), b.float()), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="same tokens"):
        token_divergence(a, b[:, :2])


def test_the_figures_of_a_text_are_those_of_its_tokens():
    torch.manual_seed(0)
    kl = torch.rand(40, 20, dtype=torch.float64) ** 4
    tokens = TokenDivergence(kl, kl / 2, torch.rand(40, 20) > 0.25)
    found = divergence(tokens, before=1)
    ordered = sorted(kl.flatten().tolist())
    assert found["kl_mean"] == pytest.approx(math.fsum(ordered) / 800) and found["tokens"] == 800
    assert found["kl_median"] == pytest.approx((ordered[399] + ordered[400]) / 2)
    assert ordered[790] <= found["kl_p99"] <= ordered[792] and found["kl_max"] == ordered[-1]
    assert found["kl_p99"] < found["kl_p999"] < found["kl_max"]
    assert found["kl_stderr"] == pytest.approx(float(kl.mean(1).std()) / math.sqrt(40), rel=0.1)
    assert found["top1_agreement"] == pytest.approx(tokens.same_top.double().mean().item())


def test_positions_are_in_at_most_16_bins_that_cover_each_token_once():
    kl = torch.arange(50, dtype=torch.float64).expand(3, 50)
    bins = divergence(TokenDivergence(kl, kl * 0, kl > 1), before=2)["by_position"]
    assert len(bins) == 16 and bins[0]["first"] == 2 and bins[-1]["last"] == 51
    for one, following in pairwise(bins):
        assert following["first"] == one["last"] + 1
    for one in bins:  # here the divergence is the position
        assert one["kl_mean"] == pytest.approx((one["first"] + one["last"]) / 2 - 2)
    few = divergence(TokenDivergence(kl[:1, :3], kl[:1, :3], kl[:1, :3] > 1))
    assert len(few["by_position"]) == 3 and few["kl_stderr"] is None
