"""Damage of every sort is found, and the tensor named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import sha256
from paredown.compress.errors import PareError
from paredown.compress.run.pipeline import score
from paredown.compress.run.verify import PROBE_TOLERANCE, verify
from paredown.compress.text.windows import Windows

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def sound(tmp_path_factory, save_model, prune):
    import transformers

    folder = tmp_path_factory.mktemp("verify")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    save_model(folder / "model", config)
    prune(folder / "model", folder / "packed")
    prune(folder / "model", folder / "dense", format="dense")
    prune(folder / "model", folder / "bitmap", sparsity=0.5)
    return folder


@pytest.fixture
def damage(sound, tmp_path):
    """`damage(format, edit)`: a copy with `edit(tensors)` applied; `rehash` also makes the record agree with it."""

    def run(format, edit, rehash=False):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = shutil.copytree(sound / format, tmp_path / "copy")
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if rehash:
            record = json.loads((folder / "paredown.json").read_text())
            for name, tensor in tensors.items():
                record["tensors"][name]["sha256"] = sha256(tensor)
            (folder / "paredown.json").write_text(json.dumps(record))
        return verify(folder)

    return run


@pytest.mark.parametrize("format", ["packed", "dense", "bitmap"])
def test_what_was_written_is_sound(format, sound):
    assert verify(sound / format) == []


@pytest.mark.parametrize("format", ["packed", "dense", "bitmap"])
def test_one_flipped_bit_is_found_anywhere(format, sound, tmp_path):
    data = (sound / format / "model.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little") + 8
    for place in torch.linspace(header, len(data) - 1, 5).long().tolist():
        folder = shutil.copytree(sound / format, tmp_path / str(place))
        flipped = bytearray(data)
        flipped[place] ^= 1
        (folder / "model.safetensors").write_bytes(flipped)
        faults = verify(folder)
        assert len(faults) == 1 and faults[0].startswith("tensor '") and "sha256 differs" in faults[0]


def test_removed_added_and_reshaped_tensors_are_named(damage):
    assert damage("packed", lambda t: t.pop(f"{UP}.values")) == [f"tensor '{UP}.values' is missing"]
    faults = damage("packed", lambda t: t.update(more=torch.zeros(1)))
    assert faults == ["tensor 'more' is not in paredown.json"]
    (fault,) = damage("dense", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"][:-1].clone()}))
    assert "up_proj.weight' is bfloat16 [95, 64], written was bfloat16 [96, 64]" in fault
    (fault,) = damage("dense", lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].half()}))
    assert "is float16 [96, 64]" in fault
    (fault,) = damage("dense", lambda t: t[f"{UP}.weight"][0].fill_(torch.nan))
    assert f"'{UP}.weight' holds NaN" in fault


def test_a_dense_weight_with_three_of_four_is_found_though_its_hash_agrees(damage):
    def edit(tensors):
        weight = tensors[f"{UP}.weight"]
        weight[5, :4] = 1e-3
        weight[6] = 0  # so that no more weights are kept than before

    faults = damage("dense", edit, rehash=True)
    assert f"{UP} is not 2:4: a group holds 4 nonzeros" in faults


def test_a_dense_weight_with_too_few_zeros_is_found(damage):
    faults = damage("dense", lambda t: t[f"{UP}.weight"].fill_(1e-3), rehash=True)
    assert any("up_proj holds 6144 nonzeros, more than the 0.5000 that were kept" in fault for fault in faults)


def test_indices_that_name_no_columns_are_found_though_their_hash_agrees(damage):
    faults = damage("packed", lambda t: t[f"{UP}.indices"][3].fill_(0), rehash=True)
    assert any(fault.startswith(f"{UP}.indices: 16 groups name no pair") for fault in faults)


def test_a_bitmap_that_marks_another_count_is_found_though_its_hash_agrees(damage):
    def edit(tensors):
        tensors[f"{UP}.bitmap"][0, 0] ^= 1

    assert any(fault.startswith(f"{UP}.bitmap: marks") for fault in damage("bitmap", edit, rehash=True))


def test_values_that_changed_together_with_their_hash_are_found_by_the_probe(damage):
    faults = damage("packed", lambda t: t["model.norm.weight"].mul_(8), rehash=True)
    assert len(faults) == 1 and faults[0].startswith("on the probe window the loss differs by")


@pytest.mark.parametrize(("times", "sound_still"), [(3, True), (5, False)])
def test_losses_that_differ_by_a_few_times_their_rounding_are_another_devices(times, sound_still, sound, tmp_path):
    folder = shutil.copytree(sound / "packed", tmp_path / "copy")
    record = json.loads((folder / "paredown.json").read_text())
    window = Windows(torch.tensor([record["probe"]["ids"]]), "probe", "", "")
    narrow, wide = (
        score(ModelSource(folder, "m", dtype=dtype), [window], lambda done, total: None)[0][0]
        for dtype in (torch.bfloat16, torch.float32)
    )
    moved = PROBE_TOLERANCE + times * (narrow - wide).abs().mean()
    record["probe"]["nll"] = (narrow + moved).tolist()
    (folder / "paredown.json").write_text(json.dumps(record))
    assert moved > PROBE_TOLERANCE and (verify(folder) == []) == sound_still


def test_a_layer_of_the_record_that_is_not_there_is_named(sound, tmp_path):
    folder = shutil.copytree(sound / "packed", tmp_path / "copy")
    record = json.loads((folder / "paredown.json").read_text())
    record["layers"]["model.layers.9.mlp.up_proj"] = record["layers"][UP]
    (folder / "paredown.json").write_text(json.dumps(record))
    assert verify(folder) == ["layer 'model.layers.9.mlp.up_proj' of the record is not in the model"]


def test_a_folder_that_is_not_ours_or_too_new_is_refused(sound, tmp_path):
    with pytest.raises(PareError, match="was not written by paredown"):
        verify(sound / "model")
    folder = shutil.copytree(sound / "packed", tmp_path / "copy")
    (folder / "paredown.json").write_text(json.dumps({"format_version": 99, "tensors": {}}))
    with pytest.raises(PareError, match="has format 99"):
        verify(folder)
