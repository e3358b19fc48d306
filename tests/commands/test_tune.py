"""`paredown tune`, with a GPU that is only said to be there."""

import pytest
import torch

from paredown.compress.errors import PareError
from paredown.compress.run.tune import tune
from paredown.compress.storage.fuse import products
from paredown.compress.storage.spec import Spec
from paredown.kernels import dispatch
from paredown.kernels.dispatch import Choice, DispatchTable
from paredown.kernels.tuning import Product


def spec(kind, out, inner, **asked):
    return Spec(kind, (out, inner), **asked)


def test_products_are_fused_as_the_model_is():
    modules = {
        "m.0.q_proj": spec("sparse24", 64, 32, values=1024), "m.0.k_proj": spec("sparse24", 32, 32, values=512),
        "m.0.v_proj": spec("bitmap", 32, 32, values=256), "m.0.o_proj": spec("sparse24", 32, 64, values=1024),
        "m.0.gate_proj": spec("pifa", 96, 32, rank=5), "m.0.up_proj": spec("pifa", 96, 32, rank=8),
        "m.0.down_proj": spec("cur", 32, 96, rank=5), "m.0.experts.up": Spec("sparse24", (2, 64, 32), "experts", values=1),
        "m.2.o_proj": spec("sparse24_lowrank", 32, 64, values=1024, rank=3), "m.2.fc": spec("bitmap_lowrank", 32, 64, values=512, rank=3),
        "m.2.gate_proj": spec("sparse24_lowrank", 96, 32, values=1536, rank=2), "m.2.up_proj": spec("sparse24_lowrank", 96, 32, values=1536, rank=4),
        "m.1.q_proj": spec("sparse24", 64, 32, values=1024), "m.1.k_proj": spec("sparse24", 32, 32, values=512),
    }  # fmt: skip
    assert products(modules) == {
        Product("sparse24", 96, 32), Product("bitmap", 32, 32, density=0.25), Product("sparse24", 32, 64),
        Product("pifa", 192, 32, 6), Product("cur", 32, 96, 5), Product("sparse24_lowrank", 32, 64, 3),
        Product("bitmap", 32, 64, density=0.25), Product("lowrank", 32, 64, 3),
        Product("sparse24", 192, 32), Product("lowrank", 192, 32, 3),
    }  # fmt: skip


def test_without_a_gpu_it_says_so_and_a_dense_folder_is_refused(tiny_model, tmp_path, prune):
    prune(tiny_model, tmp_path / "out")
    with pytest.raises(PareError, match="this machine has none"):
        tune([tmp_path / "out"], "cpu")
    with pytest.raises(PareError, match="no packed linear layers"):
        tune([tiny_model], "cpu")
    with pytest.raises(PareError, match=r"no config\.json"):
        tune([tmp_path], "cpu")


def test_what_was_measured_is_kept_beside_other_sizes_and_used(tiny_model, tmp_path, prune, monkeypatch):
    prune(tiny_model, tmp_path / "out")
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path / "cache"))
    asked = []

    def measure(wanted, device, dtype, progress):
        asked.append((wanted, device.type, dtype))
        return DispatchTable(
            "Some GPU", 90, "measured", tuple(Choice(p.op, p.rows, p.columns, 1, "mma") for p in wanted)
        )

    other = Choice("bitmap", 7, 8, 1, "portable")
    file = dispatch.cache_file("Some GPU")
    file.parent.mkdir(parents=True)
    file.write_text(
        DispatchTable("Some GPU", 90, "measured", (other, Choice("sparse24", 128, 64, 1, "dense"))).to_json()
    )
    table, written = tune([tmp_path / "out"], torch.device("cuda", 0), measure=measure)
    assert asked == [({Product("sparse24", 128, 64), Product("sparse24", 64, 64), Product("sparse24", 192, 64), Product("sparse24", 64, 96)}, "cuda", torch.bfloat16)]  # fmt: skip
    assert written == file and DispatchTable.parse(file.read_text()) == table
    assert other in table.choices and {c.path for c in table.choices if c.op == "sparse24"} == {"mma"}
