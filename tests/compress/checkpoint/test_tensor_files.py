"""Safetensors as one lazy dictionary: what is read is what is stored, and nothing outside the folder is touched."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from paredown.compress.checkpoint.tensor_files import INDEX, TensorFiles, all_finite, sha256
from paredown.compress.errors import PareError

A, B = torch.arange(6.0).view(2, 3), torch.arange(4, dtype=torch.uint8)


@pytest.fixture
def shards(tmp_path):
    save_file({"a": A.bfloat16()}, tmp_path / "one.safetensors")
    save_file({"b": B, "c": A}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"})
    return tmp_path


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_read_as_one_dictionary_in_their_own_dtypes(shards):
    files = TensorFiles(shards)
    entry = files.entries["a"]
    assert (entry.file, entry.shape, entry.dtype, entry.bytes) == ("one.safetensors", (2, 3), torch.bfloat16, 12)
    read = files.read(["c", "a", "b"])
    assert set(read) == {"a", "b", "c"}
    assert torch.equal(read["a"], A.bfloat16()) and read["a"].dtype == torch.bfloat16
    assert torch.equal(read["b"], B) and torch.equal(read["c"], A)


@pytest.mark.parametrize(
    "evil", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x", "", ".", ".."]
)
def test_an_index_may_only_name_files_of_the_folder(evil, shards):
    write_index(shards, {"a": "one.safetensors", "b": evil})
    with pytest.raises(PareError, match="plain file names"):
        _ = TensorFiles(shards).entries


def test_a_single_file_goes_before_an_index_beside_it_as_in_transformers(shards):
    assert not TensorFiles(shards).ignored_index
    save_file({"d": A}, shards / "model.safetensors")
    save_file({"e": A}, shards / "consolidated.safetensors")
    files = TensorFiles(shards)
    assert set(files.entries) == {"d"} and files.ignored_index
    (shards / INDEX).write_text("{")
    assert set(TensorFiles(shards).entries) == {"d"}


def test_a_folder_with_the_name_of_the_single_file_does_not_hide_the_shards(shards):
    (shards / "model.safetensors").mkdir()
    assert set(TensorFiles(shards).entries) == {"a", "b", "c"}


def test_an_index_entry_that_is_no_string_is_refused(shards):
    write_index(shards, {"a": "one.safetensors", "b": 3})
    with pytest.raises(PareError):
        _ = TensorFiles(shards).entries


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": []}', "null", "[" * 9999])
def test_a_damaged_index_is_told_as_such(content, shards):
    (shards / INDEX).write_text(content)
    with pytest.raises(PareError, match="is not a safetensors index"):
        _ = TensorFiles(shards).entries


def test_a_tensor_that_its_shard_does_not_hold_is_named(shards):
    write_index(shards, {"a": "one.safetensors", "missing.weight": "two.safetensors"})
    with pytest.raises(PareError, match=r"the index names 'missing.weight'.*fetch the checkpoint again"):
        _ = TensorFiles(shards).entries


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_truncated_file_is_refused_before_data_is_read(keep, shards):
    path = shards / "two.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PareError, match="truncated or damaged"):
        _ = TensorFiles(shards).entries


def test_an_empty_folder_and_one_of_pickles_say_what_to_do(tmp_path):
    with pytest.raises(PareError, match="Name a folder with a Hugging Face model"):
        _ = TensorFiles(tmp_path).entries
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(PareError, match=r"pytorch_model.bin.*save_pretrained"):
        _ = TensorFiles(tmp_path).entries


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_value_that_is_not_finite_is_found_and_its_tensor_named(value, dtype, tmp_path):
    bad = torch.zeros(7, 5, dtype=dtype)
    bad[3, 2] = value
    save_file({"fine": torch.zeros(2), "bad.weight": bad}, tmp_path / "model.safetensors")
    files = TensorFiles(tmp_path)
    assert torch.equal(files.read(["fine"])["fine"], torch.zeros(2))
    with pytest.raises(PareError, match=r"bad.weight' holds NaN or infinite"):
        files.read(["bad.weight"])
    assert files.read(["bad.weight"], finite=False)["bad.weight"].isfinite().sum() == 34


def test_finiteness_of_odd_tensors():
    assert all_finite(torch.empty(0, 4)) and all_finite(torch.tensor(1.0)) and not all_finite(torch.tensor(torch.inf))


def test_sha256_is_that_of_the_bytes_in_reading_order():
    for tensor in (A, A.T, A.bfloat16(), B, torch.empty(0), torch.tensor(3.0)):
        wanted = hashlib.sha256(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())).hexdigest()
        assert sha256(tensor) == wanted
