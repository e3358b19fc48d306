"""Damage of every sort is found, and the tensor or file named; what is loaded is what was written."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.companions import file_sha256
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import sha256
from paredown.compress.errors import PareError
from paredown.compress.run import loaded
from paredown.compress.run.export import export
from paredown.compress.run.scoring import score
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


@pytest.fixture
def copy(sound, tmp_path):
    """`copy(format)`: a folder whose files may be changed."""
    return lambda format: shutil.copytree(sound / format, tmp_path / "copy")


def rewrite(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def rehash(folder):
    """Let the record agree with the files."""

    def edit(record):
        record["files"] = {name: file_sha256(folder / name) for name in record["files"]}

    rewrite(folder / "paredown.json", edit)


def test_files_that_changed_or_are_gone_are_named(copy):
    folder = copy("packed")
    rewrite(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    (folder / "tokenizer_config.json").unlink()
    (folder / "README.md").write_text("my own words")
    assert verify(folder) == [
        "file 'config.json' has changed since it was written (sha256 differs)",
        "file 'tokenizer_config.json' is missing or cannot be read",
    ]


def test_a_file_outside_the_folder_is_not_read(copy):
    folder = copy("packed")
    rewrite(folder / "paredown.json", lambda record: record.update(files={"../model/config.json": "", "/dev/zero": ""}))
    assert all("would lie outside the folder" in fault for fault in verify(folder)) and len(verify(folder)) == 2


def test_another_tokenizer_is_found_by_its_ids(copy):
    folder = copy("dense")

    def swap(tokenizer):
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]

    rewrite(folder / "tokenizer.json", swap)
    rehash(folder)
    (fault,) = verify(folder)
    assert fault.startswith("the tokenizer (") and "gives other ids than the model's own: of \"Hello" in fault
    (folder / "tokenizer.json").write_text("{}")
    rehash(folder)
    (fault,) = verify(folder)
    assert fault.startswith("the tokenizer in ") and "cannot be loaded" in fault


@pytest.fixture
def mended_class(monkeypatch):
    """`mended_class(edit)`: from_pretrained gives a model on which `edit(model)` was called."""
    load = transformers_plugin.load

    def run(edit):
        def changed(*args, **options):
            model, told = load(*args, **options)
            edit(model)
            return model, told

        monkeypatch.setattr(transformers_plugin, "load", changed)

    return run


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_buffer_that_from_pretrained_leaves_unfilled_is_found(format, sound, mended_class):
    mended_class(lambda model: model.model.rotary_emb.inv_freq.fill_(torch.nan))
    (fault,) = verify(sound / format)
    assert fault.startswith("loaded by from_pretrained: the model's loss is not finite for 23 of 23 tokens")


def test_other_numbers_than_were_written_are_found_when_they_are_loaded(sound, mended_class):
    mended_class(lambda model: model.model.norm.weight.data.mul_(8))
    (fault,) = verify(sound / "packed")
    assert fault.startswith("on the probe window the loss differs by")


def test_a_model_that_loads_otherwise_or_not_at_all_is_a_fault(sound, mended_class):
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    mended_class(lambda model: setattr(model, "all_tied_weights_keys", tied))
    (fault,) = verify(sound / "dense")
    assert fault == "from_pretrained loads weight 'lm_head.weight' tied to another, and it was written not tied"

    def broken(model):
        raise RuntimeError("no such thing")

    mended_class(broken)
    assert verify(sound / "dense") == ["loaded by from_pretrained it fails: RuntimeError: no such thing"]


@pytest.mark.parametrize("format", ["packed", "dense"])
def test_a_model_that_is_larger_than_memory_is_loaded_from_the_disk(format, sound, mended_class, monkeypatch):
    monkeypatch.setattr(loaded, "available_memory", lambda: 0)
    told = []
    assert verify(sound / format, told.append) == []
    mended_class(lambda model: model.model.rotary_emb.inv_freq.fill_(torch.nan))
    assert verify(sound / format, told.append) != [] and told == []


def test_without_memory_and_disk_it_is_read_block_by_block_and_said(sound, monkeypatch):
    monkeypatch.setattr(loaded, "available_memory", lambda: 0)
    monkeypatch.setattr(loaded.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    told = []
    assert verify(sound / "packed", told.append) == []
    assert len(told) == 1 and "read block by block instead" in told[0]


def test_tokens_of_the_probe_that_the_model_does_not_know_are_a_fault(copy):
    folder = copy("dense")
    rewrite(folder / "paredown.json", lambda record: record["probe"]["ids"].__setitem__(0, 5000))
    assert verify(folder) == ["the probe of paredown.json holds tokens that the model does not know"]


WRONG = {
    "no dictionary": lambda record: [record],
    "no tensors": lambda record: {k: v for k, v in record.items() if k != "tensors"},
    "a tensor's shape": lambda record: record | {"tensors": {"a": {"shape": "x", "dtype": "bfloat16", "sha256": ""}}},
    "layers": lambda record: record | {"layers": 7},
    "kept": lambda record: record | {"layers": {UP: {"kept": float("nan")}}},
    "sparsity": lambda record: record | {"layers": {UP: {"kept": 0.5, "sparsity": "9:4"}}},
    "probe": lambda record: record | {"probe": {"ids": [1, 2], "nll": [1.0, 2.0]}},
    "ids": lambda record: record | {"probe": {"ids": [1, "2"], "nll": [1.0]}},
    "a huge id": lambda record: record | {"probe": {"ids": [1, 10**30], "nll": [1.0]}},
    "tied": lambda record: record | {"tied": ["a"]},
    "files": lambda record: record | {"files": {"a": None}},
    "version": lambda record: record | {"format_version": "2"},
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_record_is_told_in_a_sentence(what, copy, tmp_path):
    folder = copy("dense")
    record = json.loads((folder / "paredown.json").read_text())
    (folder / "paredown.json").write_text(json.dumps(WRONG[what](record)))
    for use in (verify, lambda f: export(f, tmp_path / "out")):
        with pytest.raises(PareError, match=r"paredown.json is damaged: .* Fetch the checkpoint again"):
            use(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_record_that_is_no_json_is_told_in_a_sentence(content, copy):
    folder = copy("dense")
    (folder / "paredown.json").write_bytes(content)
    with pytest.raises(PareError, match=r"has no readable paredown.json"):
        verify(folder)
