"""SparseGPT's sweep of a block in Triton's interpreter: the plain loop's mask and numbers."""

import pytest
import torch

from paredown.kernels import obs_sweep, selftest
from paredown.kernels.obs_sweep import naive, sweep

PATTERNS = [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2), (5, 8), (1, 1)]
FRACTION = [0.0, 0.5, 0.31, 1.0]


def problem(columns, rows, seed=0, dead=()):
    """A random block (columns, out) and the factor of a damped inverse Hessian. Dead columns: no weight, no correlation."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * columns, columns, generator=draw) @ torch.randn(columns, columns, generator=draw)
    inputs[:, list(dead)] = 0.0
    hessian = (inputs.T @ inputs).double() / len(inputs)
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    hessian[list(dead), list(dead)] = 1.0
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).float().contiguous()
    block = torch.randn(columns, rows, generator=draw)
    block[list(dead)] = 0.0
    return block, factor


def lowest_removed(block, factor, fraction):
    """A mask chosen jointly over all rows, as an unstructured sweep does when it comes to a block."""
    scores = (block / factor.diagonal()[:, None]).abs().flatten()
    keep = torch.ones_like(scores, dtype=torch.bool)
    keep[scores.argsort()[: round(fraction * len(scores))]] = False
    return keep.view(block.shape)


def check(block, factor, keep=None, pattern=None):
    before = block.clone()
    with selftest.poisoned():
        updated, errors, mask = sweep(block, factor, keep, pattern)
    wanted = naive(block, factor, keep, pattern)
    assert torch.equal(mask, wanted[2]) and torch.equal(block, before)
    assert torch.isfinite(errors).all() and not updated[~mask].any() and not errors[mask].any()
    torch.testing.assert_close(updated, wanted[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(errors, wanted[1], rtol=1e-5, atol=1e-6)
    return updated, errors, mask


def slow(block, factor, pattern):
    """Algorithm 1 of Frantar & Alistarh 2023 one weight at a time, in Python's own numbers."""
    (n, m), u = pattern, factor.tolist()
    rows, masks = block.T.tolist(), []
    for w in rows:
        keep = []
        for j in range(len(w)):
            if j % m == 0:
                ranked = sorted(range(j, j + m), key=lambda k: -((w[k] / u[k][k]) ** 2))[:n]
                keep += [k in ranked for k in range(j, j + m)]
            if not keep[j]:
                error = w[j] / u[j][j]
                w[j:] = [w[k] - u[j][k] * error for k in range(j, len(w))]
                w[j] = 0.0
        masks.append(keep)
    return torch.tensor(rows).T, torch.tensor(masks).T


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_reference_is_the_algorithm_weight_by_weight(pattern):
    block, factor = problem(16, 9)
    updated, errors, mask = naive(block.double(), factor.double(), pattern=pattern)
    wanted, keep = slow(block.double(), factor.double(), pattern)
    assert torch.equal(mask, keep)
    torch.testing.assert_close(updated.float(), wanted, rtol=1e-5, atol=1e-6)
    # what the errors sent on is what has changed: W - W' = E U
    torch.testing.assert_close(block.double() - updated, factor.double().triu().T @ errors, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_is_chosen_in_the_kernel(pattern):
    _, _, mask = check(*problem(32, 20), pattern=pattern)
    n, m = pattern
    assert mask.view(32 // m, m, 20).sum(1).eq(n).all()


@pytest.mark.parametrize("fraction", FRACTION)
def test_a_mask_is_followed(fraction):
    block, factor = problem(32, 20)
    updated, _, _ = check(block, factor, lowest_removed(block, factor, fraction))
    assert (fraction > 0 or torch.equal(updated, block)) and (fraction < 1 or not updated.any())


@pytest.mark.parametrize("rows", [1, 31, 33])
def test_any_number_of_rows_is_swept(rows):
    block, factor = problem(24, rows)
    check(block, factor, pattern=(2, 4))
    check(block, factor, torch.rand(24, rows) < 0.5)


@pytest.mark.parametrize(
    ("columns", "pattern"), [(4, (2, 4)), (36, (1, 4)), (40, (4, 8)), (1, None), (15, None), (17, None)]
)
def test_a_last_block_may_be_narrow(columns, pattern):
    block, factor = problem(columns, 5)
    check(block, factor, None if pattern else torch.rand(columns, 5) < 0.5, pattern)


def test_a_whole_block_of_128_columns_is_swept():
    check(*problem(128, 7), pattern=(2, 4))


def test_rows_are_swept_as_if_they_were_alone():
    block, factor = problem(20, 40)
    together = sweep(block, factor, pattern=(2, 4))
    for row in (0, 32, 39):
        alone = sweep(block[:, row : row + 1].contiguous(), factor, pattern=(2, 4))
        assert all(torch.equal(a[:, row : row + 1], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8), None], ids=str)
def test_dead_columns_end_at_zero_and_a_group_of_them_keeps_the_first(pattern):
    dead = (0, 1, 2, 3, 6, 8, 9, 10, 11, 12, 13, 14, 15)
    block, factor = problem(24, 6, dead=dead)
    updated, errors, mask = check(block, factor, torch.rand(24, 6) < 0.5 if pattern is None else None, pattern)
    assert not updated[list(dead)].any() and not errors[list(dead)].any()
    if pattern:
        n, m = pattern
        assert mask[8 : 8 + n].all() and not mask[8 + n : 8 + m].any()


def test_of_equal_scores_the_first_stays():
    factor = 2 * torch.eye(16)
    block = torch.tensor([1.0, -1.0, 1.0, 1.0, 0.0, -0.0, 3.0, -3.0] * 2)[:, None].repeat(1, 3)
    assert (
        check(block, factor, pattern=(2, 4))[2][:, 0].tolist()
        == [True, True, False, False, False, False, True, True] * 2
    )
    assert (
        check(block, factor, pattern=(4, 8))[2][:, 0].tolist()
        == [True, True, False, False, False, False, True, True] * 2
    )


def test_what_is_not_contiguous_and_what_lies_below_the_diagonal_makes_no_difference():
    block, factor = problem(24, 10)
    wanted = sweep(block, factor, pattern=(2, 4))
    below = torch.full((24, 24), torch.nan).tril(-1) + factor
    for other in (
        sweep(block.T.contiguous().T, below.T.contiguous().T, pattern=(2, 4)),
        sweep(block, factor, wanted[2].T.contiguous().T),
    ):
        assert all(torch.equal(a, b) for a, b in zip(wanted, other, strict=True))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": (2, 3)}, "2:3 of 24 columns: m must be one of"),
        ({"pattern": (4, 16)}, "m must be one of"),
        ({"pattern": (0, 4)}, "n 1 to m"),
        ({}, "either a mask or a pattern"),
        ({"pattern": (2, 4), "keep": torch.ones(24, 3, dtype=torch.bool)}, "either a mask or a pattern"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused(arguments, words):
    block, factor = problem(24, 3)
    for function in (sweep, naive):
        with pytest.raises(ValueError, match=words):
            function(block, factor, **arguments)


def test_each_m_fits_into_the_columns_that_a_thread_holds():
    assert all(obs_sweep.TILE % m == 0 for m in obs_sweep.GROUPS)


SMALL = [((20, 33), (2, 4)), ((17, 5), None), ((16, 8), (4, 8))]


def test_the_self_test_passes_what_is_right():
    assert selftest.check_sweeps(torch.device("cpu"), SMALL) == []


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda u, e, m: (u + 1e-3, e, m), "relative error of the updated block"),
        (lambda u, e, m: (u, torch.full_like(e, torch.nan), m), "relative error of the errors nan"),
        (lambda u, e, m: (u + 1e-7 * torch.rand(()), e, m), "other bits"),
        (lambda u, e, m: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_the_self_test_names_what_is_wrong(monkeypatch, broken, words):
    monkeypatch.setattr(obs_sweep, "sweep", lambda *arguments: broken(*naive(*arguments)))
    faults = selftest.check_sweeps(torch.device("cpu"), SMALL)
    assert len(faults) == len(SMALL) and all(words in fault for fault in faults)
    assert faults[0].startswith("20 columns of 33 rows, 2:4: ") and "17 columns of 5 rows, a fixed mask" in faults[1]


def test_the_self_test_sees_a_mask_that_is_not_the_loops(monkeypatch):
    def last(block, factor, keep, pattern):
        n, m = pattern
        mask = (torch.arange(len(block)) % m >= m - n)[:, None].expand(block.shape)
        return naive(block, factor, mask)

    monkeypatch.setattr(obs_sweep, "sweep", last)
    assert "of the mask differ" in selftest.check_sweeps(torch.device("cpu"), SMALL[:1])[0]
