"""Dispatch tables: which one is read, which choice it gives, and that the shipped tables are what the roofline says."""

import json
from dataclasses import replace

import pytest
import torch

from paredown.kernels import dispatch, roofline
from paredown.kernels.dispatch import Choice, DispatchTable

TABLE = DispatchTable(
    "Some GPU", 90, "measured",
    (
        Choice("sparse24", 4096, 4096, 8, "mma", {"warps": 8}, 1.5),
        Choice("sparse24", 4096, 4096, 64, "portable"),
        Choice("sparse24", 14336, 4096, 8, "mma", {"warps": 4}, 1.6),
        Choice("bitmap", 4096, 4096, 8, "dense"),
    ),
)  # fmt: skip
GPU = torch.device("cuda", 0)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """`a_gpu(name, capability)`: a machine with such a device, and an empty cache folder."""

    def make(name, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path))
        dispatch.forget()

    yield make
    dispatch.forget()


@pytest.mark.parametrize(
    ("op", "tokens", "rows", "columns", "path", "tile"),
    [
        ("sparse24", 1, 4096, 4096, "mma", {"warps": 8}),
        ("sparse24", 8, 12000, 4096, "mma", {"warps": 4}),
        ("sparse24", 9, 12000, 4096, "portable", {}),
        ("bitmap", 3, 1, 1, "dense", {}),
    ],
)
def test_the_smallest_bucket_that_holds_the_tokens_and_the_nearest_shape_decide(op, tokens, rows, columns, path, tile):
    choice = TABLE.find(op, tokens, rows, columns)
    assert (choice.path, choice.tile) == (path, tile)


def test_a_table_of_few_tokens_says_nothing_about_many():
    assert TABLE.find("sparse24", 65, 4096, 4096) is None and TABLE.find("bitmap", 9, 4096, 4096) is None
    most = replace(TABLE, choices=(*TABLE.choices, Choice("sparse24", 4096, 4096, dispatch.BUCKETS[-1], "dense")))
    assert most.find("sparse24", 10**6, 4096, 4096).path == "dense"


def test_a_newer_table_keeps_what_an_older_one_measured_of_other_products():
    newer = replace(TABLE, choices=(Choice("sparse24", 4096, 4096, 8, "dense"), Choice("cur", 8, 8, 1, "torch")))
    assert newer.over(TABLE).choices == (*TABLE.choices[1:], *newer.choices)
    assert newer.over(replace(TABLE, basis="modelled")) == newer.over(replace(TABLE, device="Another")) == newer


def test_a_table_survives_being_written():
    assert DispatchTable.parse(TABLE.to_json()) == TABLE
    assert len(TABLE.to_json().splitlines()) == len(TABLE.choices) + 2  # a line each, to be read and compared


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"device": "x", "choices": [{"op": "sparse24"}]}', '{"choices": 3}'])
def test_what_is_no_table_is_refused_by_name(text, tmp_path):
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json: not a dispatch table"):
        DispatchTable.read(tmp_path / "table.json")


def test_the_users_own_table_comes_before_the_shipped_one(a_gpu):
    a_gpu("NVIDIA H100 80GB HBM3")
    assert dispatch.table_of(0).basis == "modelled"
    own = dispatch.cache_file("NVIDIA H100 80GB HBM3")
    own.parent.mkdir(parents=True)
    own.write_text(TABLE.to_json())
    dispatch.forget()
    assert dispatch.choose("sparse24", GPU, 2, 14336, 4096) == TABLE.choices[2]


def test_a_table_in_use_decides_everywhere_until_its_block_ends(a_gpu):
    a_gpu("NVIDIA H100 PCIe")
    before = dispatch.choose("bitmap", GPU, 5, 4096, 4096)
    with dispatch.using(TABLE):
        for device in (GPU, torch.device("cpu")):
            assert dispatch.choose("bitmap", device, 5, 4096, 4096) == TABLE.choices[3] != before
        assert dispatch.choose("bitmap", GPU, 9, 4096, 4096).path == "portable"  # not in the table
        with dispatch.using(replace(TABLE, choices=())):
            assert dispatch.choose("bitmap", GPU, 5, 4096, 4096).path == "portable"
        assert dispatch.table_in_use() == TABLE
    assert dispatch.table_in_use() is None and dispatch.choose("bitmap", GPU, 5, 4096, 4096) == before


def test_an_unknown_gpu_takes_the_nearest_older_table_and_a_strange_one_the_portable_kernel(a_gpu, monkeypatch):
    a_gpu("NVIDIA H100 PCIe")
    assert dispatch.table_of(0).arch == 90 and dispatch.choose("sparse24", GPU, 1, 4096, 4096).path == "mma"
    a_gpu("NVIDIA GeForce RTX 4090", (8, 9))
    assert dispatch.table_of(0).arch == 80
    a_gpu("NVIDIA H200")
    assert dispatch.table_of(0).device == "NVIDIA H200"
    a_gpu("AMD Instinct MI300X", (9, 4))
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert dispatch.table_of(0).choices == ()
    monkeypatch.setattr(torch.version, "hip", None)
    a_gpu("NVIDIA GeForce GTX 1080", (6, 1))
    assert dispatch.choose("sparse24", GPU, 1, 4096, 4096).path == "portable"
    assert dispatch.choose("sparse24", GPU, 1000, 4096, 4096).path == "dense"


def test_shipped_tables_are_what_the_roofline_says_and_only_name_launch_parameters():
    assert {json.loads(path.read_text())["device"] for path in dispatch.shipped_files()} == {
        device.name for device in roofline.DEVICES.values()
    }
    for path in dispatch.shipped_files():
        table = DispatchTable.parse(path.read_text())
        modelled = roofline.table(next(d for d in roofline.DEVICES.values() if d.name == table.device))
        assert table == roofline.beside_measured(
            modelled, table
        )  # what was measured stays when the others are written anew
        assert (table.basis == "measured") == any(choice.ratio is not None for choice in table.choices)


def test_the_roofline_repeats_the_ceilings_counted_by_hand():
    h100 = roofline.DEVICES["h100"]
    for shape, ratio in (((1024, 4096), 1.34), ((4096, 4096), 1.59), ((14336, 4096), 1.71)):
        seconds = min(roofline.paths(h100, "sparse24", 1, shape))[0]
        assert abs(roofline.dense(h100, 1, shape) / seconds - ratio) < 0.01
    # 16 bits a weight at 90% of 3.35 TB/s and one launch
    assert abs(roofline.dense(h100, 1, (4096, 4096)) - (4096 * 4096 * 2 + 2 * 8192) / (0.9 * 3.35e12) - 2e-6) < 1e-12


def test_a_cache_files_name_is_safe(monkeypatch, tmp_path):
    monkeypatch.setenv("PAREDOWN_CACHE", str(tmp_path))
    assert dispatch.cache_file("../NVIDIA / H100 (80GB)").relative_to(tmp_path).parts == (
        "kernels",
        "nvidia-h100-80gb.json",
    )
