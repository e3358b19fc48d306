"""Several texts that calibrate together: exact counts, an order that the seed decides, and each text in the report."""

import pytest
import torch

from paredown.compress.text.mix import counts, mixed
from paredown.compress.text.windows import Windows


@pytest.mark.parametrize(
    ("total", "weights", "wanted"),
    [
        (128, [1], [128]),
        (10, [1, 1, 1], [4, 3, 3]),
        (10, [0.1, 0.2], [3, 7]),
        (7, [1, 2, 4], [1, 2, 4]),
        (5, [1, 1, 8], [1, 0, 4]),  # 0.5, 0.5, 4: the first of equal remainders
        (128, [1e-9, 1], [0, 128]),
    ],
)
def test_windows_are_shared_by_largest_remainders(total, weights, wanted):
    assert counts(total, weights) == wanted and sum(wanted) == total


def windows_of(start, count, **fields):
    return Windows(torch.arange(start, start + count * 3).view(count, 3), f"text {start}", "all", str(start), **fields)


def test_a_mix_holds_every_window_once_in_an_order_of_the_seed():
    parts = [windows_of(0, 4, chat=True), windows_of(100, 8)]
    one, again, other = (mixed(parts, seed) for seed in (0, 0, 1))
    everything = torch.cat([part.ids for part in parts])
    assert torch.equal(one.ids, again.ids) and not torch.equal(one.ids, other.ids)
    assert not torch.equal(one.ids, everything) and torch.equal(one.ids.sort(0).values, everything.sort(0).values)
    told = one.provenance()
    assert [(part["corpus"], part["sequences"], part["sha256"]) for part in told["sources"]] == [
        ("text 0", 4, "0"),
        ("text 100", 8, "100"),
    ]
    assert (told["corpus"], told["sequences"]) == ("text 0 + text 100", 12) and "chat" not in told
    assert told["sha256"] != mixed(parts[::-1], 0).sha256


def test_a_single_text_stays_as_it_was_drawn():
    alone = windows_of(0, 4)
    assert mixed([alone], 3) is alone
