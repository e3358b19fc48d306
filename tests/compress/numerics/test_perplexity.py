"""Token perplexity against its formula written out, and a bootstrap whose intervals hold as often as they promise."""

import json
import math

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.numerics.perplexity import bootstrap_means, paired_delta, perplexity, target_nll, token_nll


def test_the_loss_is_minus_the_log_of_the_softmax_at_the_next_token():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    found = token_nll(logits, ids)
    assert found.shape == (2, 4) and found.dtype == torch.float32
    for row in range(2):
        for place in range(4):
            scores = [math.exp(score) for score in logits[row, place].double().tolist()]
            expected = -math.log(scores[ids[row, place + 1]] / sum(scores))
            assert found[row, place].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bytes_at_once", [1, 4 * 11 * 3, 1 << 24])
def test_the_size_of_a_chunk_changes_nothing(bytes_at_once):
    torch.manual_seed(0)
    logits, ids = torch.randn(3, 7, 11), torch.randint(11, (3, 7))
    expected = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_nll(logits, ids, bytes_at_once), expected)


def test_half_precision_logits_are_summed_in_float32():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 9, 4000).bfloat16(), torch.randint(4000, (2, 9))
    torch.testing.assert_close(token_nll(logits, ids), token_nll(logits.float(), ids), rtol=0, atol=0)
    rounded = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].float()
    assert not torch.allclose(token_nll(logits, ids), rounded, rtol=1e-4)


def test_logits_are_never_copied_whole(monkeypatch):
    sizes = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(
        torch.nn.functional, "cross_entropy", lambda rows, *a, **k: (sizes.append(rows.numel()), real(rows, *a, **k))[1]
    )
    flattened = []
    monkeypatch.setattr(torch.Tensor, "flatten", lambda tensor, *a: flattened.append(tensor.shape))
    token_nll(torch.randn(4, 33, 100), torch.randint(100, (4, 33)), chunk_bytes=4 * 100 * 2)
    assert max(sizes) <= 200 and not flattened


@pytest.mark.parametrize(("broken", "said"), [(float("nan"), "nan"), (float("inf"), "nan|inf")])
def test_a_loss_that_is_not_finite_is_an_error_that_says_where(broken, said):
    logits, ids = torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    logits[1, 2, 1] = broken
    with pytest.raises(PareError, match=rf"1 of 8 tokens.*({said}) at position 2 of window 1"):
        token_nll(logits, ids)


def test_shapes_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="wanted logits"):
        target_nll(torch.zeros(2, 5, 3), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="same windows"):
        paired_delta(torch.zeros(3, 5), torch.zeros(2, 5))


def test_perplexity_is_exp_of_the_mean_loss_over_all_tokens():
    torch.manual_seed(0)
    nll = torch.rand(7, 13) * 5
    assert perplexity(nll)["token_perplexity"] == pytest.approx(math.exp(nll.double().mean().item()), rel=1e-12)
    uniform = token_nll(torch.zeros(2, 9, 50), torch.randint(50, (2, 9)))
    assert perplexity(uniform)["token_perplexity"] == pytest.approx(50, rel=1e-5)
    assert perplexity(uniform)["stderr"] == pytest.approx(0, abs=1e-5)


def test_the_standard_errors_are_those_of_a_mean_over_windows():
    torch.manual_seed(0)
    before = 3 + 0.3 * torch.randn(400, 1) + 0.5 * torch.randn(400, 31)
    after = before + 0.2 + 0.1 * torch.randn(400, 1)
    windows, rise = before.double().mean(1), (after - before).double().mean(1)
    found = perplexity(before)
    expected = float(windows.std()) / 20 * found["token_perplexity"]
    assert found["stderr"] == pytest.approx(expected, rel=0.1)
    assert paired_delta(before, after)["stderr"] == pytest.approx(float(rise.std()) / 20, rel=0.1)
    # tokens of a window move together: to resample them one by one would promise far too much
    alone = float(before.double().std()) / math.sqrt(before.numel()) * found["token_perplexity"]
    assert found["stderr"] > 2 * alone


def test_pairing_is_what_makes_a_small_difference_visible():
    torch.manual_seed(0)
    before = 3 + torch.randn(100, 1) + 0.1 * torch.randn(100, 31)
    after = before + 0.01 + 0.01 * torch.randn(100, 1)
    delta = paired_delta(before, after)
    assert 0 < delta["low"] < delta["log_ratio"] < delta["high"]
    assert delta["stderr"] < 0.02 * perplexity(before)["stderr"] / perplexity(before)["token_perplexity"]
    assert delta["ratio"] == pytest.approx(
        perplexity(after)["token_perplexity"] / perplexity(before)["token_perplexity"], rel=1e-9
    )


def test_the_interval_holds_the_truth_about_95_times_in_100():
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        rise = 0.1 + 0.3 * torch.randn(60, 1, generator=generator)
        delta = paired_delta(torch.zeros(60, 1), rise)
        held += delta["low"] < 0.1 < delta["high"]
    assert 180 <= held <= 199


def test_equal_models_differ_by_nothing():
    delta = paired_delta(torch.rand(9, 5), torch.rand(9, 5).fill_(0.5)), paired_delta(*[torch.ones(9, 5)] * 2)
    assert delta[0]["stderr"] > 0
    assert {key: delta[1][key] for key in ("log_ratio", "stderr", "low", "high", "ratio")} == {
        "log_ratio": 0.0,
        "stderr": 0.0,
        "low": 0.0,
        "high": 0.0,
        "ratio": 1.0,
    }


def test_one_window_has_no_uncertainty_rather_than_none_at_all():
    nll = torch.rand(1, 20)
    assert perplexity(nll)["stderr"] is None
    delta = paired_delta(nll, nll + 0.1)
    assert delta["stderr"] is None and not {"low", "high"} & delta.keys()
    json.dumps([perplexity(nll), delta], allow_nan=False)


def test_the_seed_decides_the_resampling_and_blocks_of_it_do_not():
    torch.manual_seed(0)
    nll = torch.rand(37, 20)
    first = perplexity(nll, seed=1)
    assert perplexity(nll, seed=1) == first
    assert perplexity(nll, seed=2)["stderr"] != first["stderr"]
    in_blocks = bootstrap_means(nll.double().mean(1), seed=1, draws_at_once=100)
    assert float(in_blocks.exp().std()) == pytest.approx(first["stderr"], rel=1e-12)
