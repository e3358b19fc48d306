"""Entries of config.json that no weight can have are refused by a sentence that names the weight."""

import pytest
import torch
from torch import nn

from paredown.compress.errors import PareError
from paredown.compress.storage.install import install, read_specs
from paredown.compress.storage.kinds import KINDS
from paredown.compress.storage.spec import FIELDS

WHOLE = {"layout": "linear", "shape": [6, 8], "kept": 24, "rank": 2, "bias": False}
ODD = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), 10**30, 10**5000, "", "x", [], {}, [1], [-1, 8], [6, 8.0],
    ["6", 8], [6, 8, 2], [2**62, 2**62], [[6], 8], [0, 8], [True, 8], {"kind": "bitmap"}, [10**5000, 8],
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("field", [*FIELDS, "the whole entry"])
def test_a_wrong_value_is_read_rightly_or_refused_by_name(kind, field):
    refused = 0
    for odd in ODD:
        raw = {**WHOLE, "kind": kind, field: odd} if field in FIELDS else odd
        with torch.device("meta"):
            model = nn.ModuleDict({"proj": nn.Linear(8, 6)})
        try:
            install(model, read_specs({"proj": raw}))
        except PareError as fault:
            refused += 1
            assert "'proj'" in str(fault) and len(str(fault)) < 500
            assert isinstance(model["proj"], nn.Linear)
    assert refused >= len(ODD) - 6
