"""Units become the mean of those that go into them, wherever they lie in a tensor."""

import pytest
import torch

from paredown.compress.methods.base import Part
from paredown.compress.model.merging import averaged

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
def test_each_unit_is_the_mean_of_those_that_go_into_it(shape, parts, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    before, found = tensor.clone(), averaged(tensor, parts, INTO)
    wanted = tensor.clone()
    for part in parts:
        for unit in range(6):
            for i in range(part.width):
                members = [part.first + u * part.width + i for u in range(6) if INTO[u] == unit]
                place = part.first + unit * part.width + i
                mean = sum(tensor.select(part.dim, m).double() for m in members) / max(len(members), 1)
                wanted.select(part.dim, place).copy_(torch.as_tensor(mean))
    assert torch.equal(found, wanted) and torch.equal(tensor, before) and found.dtype == dtype
