"""The compressed copies for cuSPARSELt: one per weight, and a new one when the weight changes. No GPU is needed."""

import torch
from torch.nn import functional as F

from paredown.kernels import sparse24_cusparselt
from paredown.kernels.sparse24 import pack24, unpack24


def test_a_copy_serves_until_the_weight_changes(random_24):
    compressed = []

    def matmul(x, values, indices):
        """The copy is the dense weight instead of cuSPARSELt's format."""

        def compress(values, indices):
            compressed.append(values)
            return unpack24(values, indices)

        return sparse24_cusparselt.matmul(
            x, values, indices, None, {}, compress, lambda copy, x, bias, _: F.linear(x, copy, bias)
        )

    first, second = random_24(16, 64, torch.float32), random_24(16, 64, torch.float32, seed=1)
    (values, indices), others, x = pack24(*first), pack24(*second), torch.randn(3, 64)
    for _ in range(2):
        assert torch.equal(matmul(x, values, indices), F.linear(x, first[0]))
    assert len(compressed) == 1
    values.copy_(others[0])  # as load_state_dict does
    indices.copy_(others[1])
    assert torch.equal(matmul(x, values, indices), F.linear(x, second[0]))
    values.data = pack24(*first)[0]  # as Module.to does
    indices.data = pack24(*first)[1]
    assert torch.equal(matmul(x, values, indices), F.linear(x, first[0]))


def test_a_weight_on_a_cpu_or_of_parts_of_the_librarys_tiles_is_not_taken(monkeypatch):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)

    class OnAGpu:
        is_cuda = True

        def __init__(self, *shape):
            self.shape = shape

    assert not sparse24_cusparselt.is_available(torch.zeros(64, 64))
    assert sparse24_cusparselt.is_available(OnAGpu(64, 64))
    assert not sparse24_cusparselt.is_available(OnAGpu(96, 64)) and not sparse24_cusparselt.is_available(OnAGpu(64, 96))
