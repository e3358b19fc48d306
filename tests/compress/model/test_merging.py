"""Units become the mean of those that go into them, wherever they lie in a tensor."""

import pytest
import torch

from paredown.compress.methods.base import Part
from paredown.compress.model.merging import averaged, reordered

INTO = torch.tensor([0, 1, 0, 3, 1, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "parts"),
    [
        ((6, 4), [Part("w", 0)]),
        ((4, 12), [Part("w", 1, width=2)]),  # as of a Conv1D
        ((6,), [Part("b", 0)]),
        ((14, 3), [Part("gate_up", 0, first=0), Part("gate_up", 0, first=7)]),
        ((3, 20), [Part("w", 1, width=3, first=1)]),
    ],
)
@pytest.mark.parametrize("weights", [None, [3, 1, 2, 0, 0, 5]])
def test_each_unit_is_the_mean_of_those_that_go_into_it(shape, parts, dtype, weights):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    counts = weights and torch.tensor(weights)
    before, found = tensor.clone(), averaged(tensor, parts, INTO, counts)
    wanted = tensor.clone()
    for part in parts:
        for unit in set(INTO.tolist()):
            for i in range(part.width):
                total, size = 0.0, 0.0
                for u in (u for u in range(6) if INTO[u] == unit):
                    size += (weights or [1] * 6)[u]
                    own = tensor.select(part.dim, part.first + u * part.width + i).double()
                    total = total + (weights or [1] * 6)[u] * own
                if size:
                    wanted.select(part.dim, part.first + unit * part.width + i).copy_(total / size)
    torch.testing.assert_close(found, wanted)
    for unit in (2, 3, 4, 5):  # nothing else goes into these
        for part in parts:
            own = [t.narrow(part.dim, part.first + unit * part.width, part.width) for t in (found, before)]
            assert torch.equal(*own)
    assert torch.equal(tensor, before) and found.dtype == dtype


def test_units_that_count_nothing_leave_the_one_they_go_into_alone():
    tensor = torch.arange(6.0)
    assert averaged(tensor, [Part("w", 0)], INTO, torch.tensor([0, 1, 0, 9, 3, 0])).tolist() == [0, 3.25, 2, 3, 4, 5]


def test_channels_are_reordered_within_each_unit_in_all_their_copies():
    tensor = torch.arange(2 * 6 * 2).view(2, 6, 2)
    order = torch.tensor([[0, 1, 2], [2, 0, 1]])
    halves = reordered(tensor, [Part("w", 1), Part("w", 1, first=3)], order)
    pairs = reordered(tensor, [Part("w", 1, width=2)], order)
    for place in range(3):
        for copy in (0, 1):
            assert torch.equal(halves[1, 3 * copy + place], tensor[1, 3 * copy + int(order[1, place])])
            assert torch.equal(pairs[1, 2 * place + copy], tensor[1, 2 * int(order[1, place]) + copy])
    assert torch.equal(halves[0], tensor[0]) and torch.equal(pairs[0], tensor[0])
