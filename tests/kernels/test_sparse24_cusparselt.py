"""The compressed copies for cuSPARSELt, whose functions a CPU has not: made once, and anew for other weights."""

import pytest
import torch
from torch.nn import functional as F

from paredown.kernels import sparse24_cusparselt
from paredown.kernels.sparse24 import pack24, unpack24


@pytest.fixture
def made(monkeypatch):
    """What is kept is the dense weight instead; yields the weights that a copy was made of."""
    seen = []

    def compressed(values, indices):
        seen.append(values)
        return unpack24(values, indices)

    monkeypatch.setattr(sparse24_cusparselt, "_compressed", compressed)
    return seen


def test_a_copy_serves_until_the_weight_changes(made, random_24):
    first, second = random_24(16, 64, torch.float32), random_24(16, 64, torch.float32, seed=1)
    (values, indices), others, x = pack24(*first), pack24(*second), torch.randn(3, 64)
    for _ in range(2):
        assert torch.equal(sparse24_cusparselt.matmul(x, values, indices, None), F.linear(x, first[0]))
    assert len(made) == 1
    values.copy_(others[0])  # as load_state_dict does
    indices.copy_(others[1])
    assert torch.equal(sparse24_cusparselt.matmul(x, values, indices, None), F.linear(x, second[0]))
    values.data = pack24(*first)[0]  # as Module.to does
    indices.data = pack24(*first)[1]
    assert torch.equal(sparse24_cusparselt.matmul(x, values, indices, None), F.linear(x, first[0]))


def test_a_weight_on_a_cpu_or_of_odd_rows_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert not sparse24_cusparselt.is_available(torch.zeros(16, 32))
    assert not sparse24_cusparselt.is_available(torch.zeros(15, 32))
