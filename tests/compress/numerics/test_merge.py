"""A low-rank update merged into each kind of stored weight, against float64 formulas on dense matrices."""

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.numerics.factorize import Factors
from paredown.compress.numerics.masks import NofM, keep_mask
from paredown.compress.numerics.merge import Lost, Update, merge_dense, merge_packed, truncated_sum
from paredown.compress.numerics.metric import Metric
from paredown.compress.numerics.pifa import pivoted
from paredown.compress.storage.kinds import KINDS, kind_of, pack, stored_numbers
from paredown.compress.storage.spec import Spec

OUT, IN, RANK = 24, 32, 6


def normal(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def update():
    return Update(normal(OUT, 3, seed=1) * 0.3, normal(3, IN, seed=2))


def stored(kind, dtype=torch.float64):
    """A spec, its tensors and the mask, if the kind has one."""
    weight = normal(OUT, IN)
    left, right = normal(OUT, RANK, seed=3), normal(RANK, IN, seed=4)
    mask = kind.split("_")[0]
    tensors, values, rank, keep = {}, None, None, None
    if mask in ("sparse24", "bitmap"):
        keep = keep_mask(weight.abs(), NofM(2, 4)) if mask == "sparse24" else weight.abs() > 0.8
        weight[0] = 0  # kept zeros are stored too, and may gain a value
        tensors, values = pack(mask, weight, keep), int(keep.sum())
    if "lowrank" in kind:
        tensors |= {"left": left, "right": right}
    elif kind == "pifa":
        tensors = pivoted(Factors(left, right, torch.ones(OUT)), Metric(), torch.float64)
    elif kind == "cur":
        tensors = {"columns": left, "link": normal(RANK, RANK, seed=5), "rows": right}
    rank = None if kind in ("sparse24", "bitmap") else RANK
    tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    return Spec(kind, (OUT, IN), rank=rank, values=values), tensors, keep


def dense(spec, tensors):
    return kind_of(spec.kind).unpack(tensors, spec.shape).double()


def best(matrix, rank):
    left, sizes, right = torch.linalg.svd(matrix)
    return left[:, :rank] * sizes[:rank] @ right[:rank]


@pytest.mark.parametrize("kind", KINDS)
def test_merging_leaves_names_shapes_counts_and_masks_as_they_were(kind, update):
    spec, before, keep = stored(kind, torch.bfloat16)
    after, lost = merge_packed(spec, before, update)
    assert after.keys() == before.keys() == kind_of(kind).sizes(spec).keys()
    assert all(t.shape == before[name].shape and t.dtype == before[name].dtype for name, t in after.items())
    assert kind_of(kind).fault(after, spec.shape) is None and stored_numbers(spec) > 0
    for name in ("indices", "bitmap"):
        assert name not in before or torch.equal(before[name], after[name])
    if kind in ("sparse24", "bitmap"):
        assert int(torch.count_nonzero(dense(spec, after)[~keep])) == 0
    assert 0 < lost.form < lost.update and lost.written > 0


@pytest.mark.parametrize("kind", ["sparse24", "bitmap"])
def test_a_mask_multiplies_the_update(kind, update):
    spec, before, keep = stored(kind)
    after, lost = merge_packed(spec, before, update)
    change = torch.zeros(OUT, IN, dtype=torch.float64)
    for i in range(OUT):
        for j in range(IN):
            if keep[i, j]:
                change[i, j] = sum(update.up[i, k] * update.down[k, j] for k in range(3))
    assert torch.allclose(dense(spec, after), dense(spec, before) + change, atol=1e-6)
    whole = update.up @ update.down
    assert lost.update == pytest.approx(float(whole.square().sum()))
    assert lost.form == pytest.approx(float((whole - change).square().sum()), rel=1e-5)


@pytest.mark.parametrize("kind", ["lowrank", "pifa", "cur"])
def test_factors_become_the_truncated_decomposition_of_the_sum(kind, update):
    spec, before, _ = stored(kind)
    after, lost = merge_packed(spec, before, update)
    wanted = best(dense(spec, before) + update.up @ update.down, RANK)
    assert torch.allclose(dense(spec, after), wanted, atol=2e-5)
    missing = dense(spec, before) + update.up @ update.down - wanted
    assert lost.form == pytest.approx(float(missing.square().sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["sparse24_lowrank", "bitmap_lowrank"])
def test_a_mask_beside_factors_takes_what_they_leave(kind, update):
    spec, before, keep = stored(kind)
    after, lost = merge_packed(spec, before, update)
    low = before["left"] @ before["right"] + update.up @ update.down
    rest = low - best(low, RANK)
    wanted = dense(spec, before) + update.up @ update.down - rest * ~keep
    assert torch.allclose(dense(spec, after), wanted, atol=1e-5)
    assert lost.form == pytest.approx(float((rest * ~keep).square().sum()), rel=1e-4)
    alone, _ = merge_packed(Spec("lowrank", spec.shape, rank=RANK), {n: before[n] for n in ("left", "right")}, update)
    assert lost.form < float((low - alone["left"] @ alone["right"]).square().sum())


def test_a_sum_of_a_rank_above_the_weight_s_sides_is_decomposed_too():
    left, right = normal(OUT, RANK), normal(RANK, IN, seed=1)
    wide = Update(normal(OUT, 30, seed=2), normal(30, IN, seed=3))
    rows, sizes, columns = truncated_sum(left, right, wide, RANK)
    assert torch.allclose(rows * sizes @ columns, best(left @ right + wide.up @ wide.down, RANK), atol=1e-9)


def test_a_dense_weight_keeps_the_zeros_that_it_is_told_to_keep(update):
    weight = normal(OUT, IN).float()
    keep = keep_mask(weight.abs(), NofM(2, 4))
    weight = weight * keep
    narrow = Update(update.up.float(), update.down.float())
    merged, lost = merge_dense(weight, narrow, keep)
    assert torch.equal(merged == 0, ~keep) and lost.form > 0
    plain, lost = merge_dense(weight, narrow)
    assert torch.equal(plain, weight + narrow.dense()) and lost.form == 0


def test_several_adapters_are_one_update_and_no_update_loses_nothing(update):
    other = Update(normal(OUT, 2, seed=8), normal(2, IN, seed=9))
    both = Update.joined([update, other])
    assert torch.allclose(both.dense(), update.dense() + other.dense())
    assert both.energy == pytest.approx(float((update.dense() + other.dense()).square().sum()))
    assert (Lost(4.0, 1.0) + Lost(0.0, 0.0)).share(1.0) == 0.5 and Lost().share(0.0) == 0.0


@pytest.mark.parametrize("kind", ["bitmap", "lowrank", "pifa"])
def test_numbers_that_the_dtype_cannot_hold_are_an_error(kind, update):
    spec, before, _ = stored(kind, torch.float16)
    with pytest.raises(PareError, match="cannot hold"):
        merge_packed(spec, before, Update(update.up * 1e12, update.down))
