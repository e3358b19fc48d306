"""Where a shorter precision loses nothing."""

import pytest
import torch

from paredown.compress.numerics.moments import InputStats, Need
from paredown.compress.numerics.precision import exact_products

SETTINGS = torch.backends.mkldnn.matmul


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_and_cross_moments_hold_all_bits_of_their_inputs(dtype):
    generator = torch.Generator().manual_seed(0)
    x, dense = (torch.randn(3, 700, 96, generator=generator).to(dtype) for _ in range(2))
    x[0, 0] *= 1000.0  # a sink
    stats = InputStats(96, frozenset({Need.GRAM, Need.CROSS}), torch.device("cpu"))
    for batch, dense_batch in zip(x, dense, strict=True):
        stats.update(batch, dense_batch)

    rows, dense_rows = x.flatten(0, 1).double(), dense.flatten(0, 1).double()
    sizes = rows.square().mean(0).sqrt()  # (in,)
    gram, cross = rows.T @ rows / len(rows), dense_rows.T @ rows / len(rows)
    dense_sizes = dense_rows.square().mean(0).sqrt()
    # bfloat16's own rounding would be 4e-3
    assert ((stats.gram - gram).abs() / sizes.outer(sizes)).max() < 1e-5
    assert ((stats.cross - cross).abs() / dense_sizes.outer(sizes)).max() < 1e-5


def test_only_bfloat16_numbers_are_multiplied_as_such_and_only_inside():
    short, long, before = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2), SETTINGS.fp32_precision
    assert before != "bf16"
    with exact_products(short, short):
        assert SETTINGS.fp32_precision == "bf16"
    for factors in ((short, long), (long,), (short.half(),)):
        with exact_products(*factors):
            assert SETTINGS.fp32_precision == before
    with pytest.raises(RuntimeError, match="inside"), exact_products(short):
        raise RuntimeError("inside")
    assert SETTINGS.fp32_precision == before
