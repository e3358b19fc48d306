"""Parts of packed weights for several devices: multiplied and added they are the whole."""

import pytest
import torch
from packing import random_tensors

from paredown.compress.errors import PareError
from paredown.compress.serving.cutting import as_factors, cut
from paredown.compress.serving.probes import is_filled, places, probe
from paredown.compress.storage.kinds import KINDS, kind_of

OUT, INNER = 24, 32


def unpacked(kind, tensors, shape):
    return tensors["weight"] if kind == "dense" else kind_of(kind).unpack(tensors, shape)


def weight_of(kind):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    weight = torch.randn(OUT, INNER, generator=generator)
    return {"weight": weight} if kind == "dense" else random_tensors(kind, weight)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_columns_of_the_output_beside_each_other_are_the_whole_output(kind, ranks):
    tensors = weight_of(kind)
    whole = unpacked(kind, tensors, (OUT, INNER))
    order = torch.randperm(OUT)  # a loader may sort rows by head
    parts = [cut(kind, tensors, (OUT, INNER), rows, None) for rows in order.chunk(ranks)]
    x = torch.randn(5, INNER)
    products = [x @ unpacked(k, t, (OUT // ranks, INNER)).T for k, t in parts]
    torch.testing.assert_close(torch.cat(products, -1), (x @ whole.T)[:, order])


@pytest.mark.parametrize("columns", [16, 12, 6])
@pytest.mark.parametrize("kind", [*KINDS, "dense"])
def test_the_products_of_parts_of_the_input_add_up(kind, columns):
    tensors = weight_of(kind)
    whole = unpacked(kind, tensors, (OUT, INNER))
    x = torch.randn(5, INNER)
    total = torch.zeros(5, OUT)
    for own in torch.arange(INNER).split(columns):
        part, cuts = cut(kind, tensors, (OUT, INNER), None, own)
        total += x[:, own] @ unpacked(part, cuts, (OUT, len(own))).T
    torch.testing.assert_close(total, x @ whole.T)


def test_a_part_of_2_of_4_keeps_its_form_and_its_saving():
    tensors = weight_of("sparse24")
    kind, part = cut("sparse24", tensors, (OUT, INNER), torch.arange(12), torch.arange(16, 32))
    assert kind == "sparse24" and part["values"].shape == (12, 8)
    assert cut("sparse24", tensors, (OUT, INNER), None, torch.arange(6))[0] == "bitmap"


def test_a_kept_zero_stays_kept():
    weight = torch.zeros(2, 8)
    keep = torch.tensor([[True, True, False, False] * 2] * 2)
    tensors = dict(zip(("values", "indices"), KINDS["sparse24"].pack(weight, keep).values(), strict=True))
    kind, part = cut("sparse24", tensors, (2, 8), torch.tensor([1]), None)
    assert kind == "sparse24" and part["values"].shape == (1, 4)


def test_pifa_as_factors_is_the_same_weight():
    tensors = weight_of("pifa")
    kind, factors = as_factors(tensors)
    torch.testing.assert_close(
        kind_of(kind).unpack(factors, (OUT, INNER)), kind_of("pifa").unpack(tensors, (OUT, INNER))
    )


def test_what_is_not_cut_is_given_back_as_it_is():
    tensors = weight_of("cur")
    kind, same = cut("cur", tensors, (OUT, INNER), None, None)
    assert kind == "cur" and all(same[name] is tensor for name, tensor in tensors.items())


def test_probes_tell_which_rows_and_columns_a_loader_took():
    shapes = [(6, 8), (4, 8)]
    first, second = (probe(i, *shape) for i, shape in enumerate(shapes))
    rows = torch.tensor([3, 1, 5])
    loaded = torch.full((5, 4), torch.nan, dtype=torch.float64)
    loaded[:3] = first[rows][:, 4:]
    assert not is_filled(loaded)
    loaded[3:] = second[:2, 4:]
    found = places(loaded, shapes)
    assert [place.matrix for place in found] == [0, 1]
    assert [place.rows.tolist() for place in found] == [[3, 1, 5], [0, 1]]
    assert all(place.columns.tolist() == [4, 5, 6, 7] for place in found)
    whole = places(torch.cat([first, second]), shapes)
    assert all(place.rows is None and place.columns is None for place in whole)


@pytest.mark.parametrize(
    "changed",
    [lambda p: p * 2, lambda p: p.roll(1, 0) * (torch.arange(8) > 3), lambda p: torch.cat([p[:3], p[:3] + 1])],
)
def test_a_loader_that_calculates_is_noticed(changed):
    with pytest.raises(PareError, match="does more than move"):
        places(changed(probe(0, 6, 8)), [(6, 8)])


def test_a_layer_of_large_weights_is_named_to_the_last_number():
    loaded = probe(31, 2, (1 << 22) + 3)
    assert loaded.dtype == torch.float64 and int(loaded[1, -1]) == (31 << 46) + (1 << 23) + (1 << 22) + 2
    with pytest.raises(PareError, match="more than can be served"):
        probe(0, 1 << 23, 1)
