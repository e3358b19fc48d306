"""Checkpoints in compressed-tensors' removed formats, written here in slow loops, become ours without a bit changed."""

import json
import shutil
import sys
from functools import cached_property

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file

from paredown.commands.app import main
from paredown.compress.checkpoint.bitmask_import import BITMASK, SPARSE24, BitmaskFiles
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.tensor_files import TensorFiles
from paredown.compress.errors import PareError
from paredown.compress.run.export import export_source
from paredown.compress.run.verify import verify

C = {
    "vocab_size": 128, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# widths of down_proj that leave part of the last byte unused: 2:4 in groups of four, unstructured anyhow
LLAMA = {
    SPARSE24: t.LlamaConfig(**C, intermediate_size=100),
    BITMASK: t.LlamaConfig(**C, intermediate_size=90),
}
DENSE_LAYERS = ("layers.1.mlp.down_proj", "layers.0.self_attn.v_proj")  # what was left out of pruning
WEIGHT = "model.layers.0.mlp.down_proj"
SPARSITY = {
    "targets": ["Linear"], "ignore": ["lm_head"], "global_sparsity": 0.47, "registry_requires_subclass": False,
}  # fmt: skip


def settings_of(format):
    """As compressed-tensors 0.9 and later write them for a model that is sparse and nothing else."""
    structure = {SPARSE24: "2:4", BITMASK: "unstructured"}[format]
    sparsity = {**SPARSITY, "format": format, "sparsity_structure": structure}
    return {"quant_method": "compressed-tensors", "version": "0.9.0", "sparsity_config": sparsity}


def random_keep(shape, format, generator):
    """Two of every four at random, or four of ten anywhere and one row with nothing."""
    if format == SPARSE24:
        order = torch.rand(shape[0], shape[1] // 4, 4, generator=generator).argsort(-1)
        return (order < 2).reshape(shape)
    keep = torch.rand(shape, generator=generator) < 0.4
    keep[2] = False
    return keep


def slow_parts(weight, keep, format):
    """The stored tensors of one weight (of any number of dimensions), written out from the format's description."""
    width = weight.shape[-1]
    rows, kept = weight.reshape(-1, width), keep.reshape(-1, width).tolist()
    values, codes, starts = [], [], []
    for row, marks in zip(rows, kept, strict=True):
        starts.append(len(values))
        code = [0] * ((width + 7) // 8)
        for column in range(width):
            if marks[column]:
                values.append(row[column])
                code[column // 8] |= 1 << (column % 8)
        codes.append(code)
    stored = torch.stack(values) if values else weight.new_empty(0)
    bitmask = torch.tensor(codes, dtype=torch.uint8).reshape(*weight.shape[:-1], -1)
    if format == SPARSE24:
        half = stored.reshape(len(rows), width // 2)
        return {"shape": torch.tensor(weight.shape).reshape(-1, 1), "compressed": half, "bitmask": bitmask}
    offsets = torch.tensor(starts).reshape(weight.shape[:-1])
    return {"shape": torch.tensor(weight.shape), "compressed": stored, "bitmask": bitmask, "row_offsets": offsets}


def write(folder, tensors, shards=1):
    """Tensors dealt out over files one by one, so that the parts of a weight lie in different ones."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for old in folder.glob("*.safetensors"):
        old.unlink()
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def strand(tmp_path, save_model):
    """`strand(format, ...)` -> (a dense checkpoint with zeros, the same one in a removed format)."""

    def make(format, dtype=torch.bfloat16, shards=1, config=None):
        generator = torch.Generator().manual_seed(0)
        dense, old = tmp_path / "model", tmp_path / "old"
        save_model(dense, config or LLAMA[format], dtype)
        tensors, stranded = load_file(dense / "model.safetensors"), {}
        for name in sorted(tensors):
            weight = tensors[name]
            inside = ".layers." in name and weight.dim() == 2 and not any(part in name for part in DENSE_LAYERS)
            if not inside or "gate.weight" in name:
                stranded[name] = weight
                continue
            keep = random_keep(weight.shape, format, generator)
            weight[~keep] = 0
            if format == SPARSE24:  # it stores two of four even where one of them is a zero
                row = weight[5]
                row[keep[5]] = torch.tensor([0.0, 1.5, -0.0, 0.0] * 100)[: int(keep[5].sum())].to(dtype)
            else:
                keep = weight != 0
            prefix = name.removesuffix(".weight")
            stranded |= {f"{prefix}.{part}": t for part, t in slow_parts(weight, keep, format).items()}
        write(dense, tensors)
        shutil.copytree(dense, old)
        write(old, stranded, shards)
        configure(old, quantization_config=settings_of(format))
        return dense, old

    return make


def convert(folder, out, format=None):
    return export_source(ModelSource(folder, folder.name, stranded=True), out, format, lambda done, total: None)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int16), b.view(torch.int16))


def assert_old_settings_are_gone(folder):
    text = (folder / "config.json").read_text()
    assert not any(word in text for word in ("compressed-tensors", "compression_config", "sparsity_config", "bitmask"))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [SPARSE24, BITMASK])
def test_a_stranded_checkpoint_computes_what_the_dense_one_does(format, dtype, shards, strand, tmp_path, logits_of):
    dense, old = strand(format, dtype, shards)
    told = convert(old, tmp_path / "packed")
    stored = sum(entry.bytes for entry in TensorFiles(old).entries.values())
    assert told["format"] == "packed" and told["bytes"]["before"] == stored
    assert told["bytes"]["after"] < sum(entry.bytes for entry in TensorFiles(dense).entries.values())
    wanted = logits_of(dense)
    assert wanted.dtype == dtype and torch.equal(logits_of(tmp_path / "packed"), wanted)
    modules = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["modules"]
    pruned = {n.removesuffix(".bitmask") for n in TensorFiles(old).entries if n.endswith(".bitmask")}
    assert len(pruned) == 12
    assert {name: spec["kind"] for name, spec in modules.items()} == dict.fromkeys(
        pruned, {SPARSE24: "sparse24", BITMASK: "bitmap"}[format]
    )
    assert_old_settings_are_gone(tmp_path / "packed")
    assert verify(tmp_path / "packed") == []


@pytest.mark.parametrize("format", [SPARSE24, BITMASK])
def test_as_dense_every_tensor_comes_back_bit_for_bit(format, strand, tmp_path):
    dense, old = strand(format)
    assert convert(old, tmp_path / "out", "dense")["format"] == "dense"
    wanted, found = (load_file(folder / "model.safetensors") for folder in (dense, tmp_path / "out"))
    assert wanted.keys() == found.keys() and all(same_bits(wanted[name], found[name]) for name in wanted)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert_old_settings_are_gone(tmp_path / "out")
    assert verify(tmp_path / "out") == []
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize(
    "config",
    [
        t.LlamaConfig(**C, intermediate_size=96, tie_word_embeddings=True),
        t.MixtralConfig(**C, intermediate_size=96, num_local_experts=4),
    ],
    ids=["tied", "experts"],
)
def test_tied_embeddings_and_experts_that_the_class_fuses(config, strand, tmp_path, logits_of):
    dense, old = strand(SPARSE24, config=config)
    convert(old, tmp_path / "packed")
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(dense))
    kinds = {e["kind"] for e in json.loads((tmp_path / "packed" / "paredown.json").read_text())["tensors"].values()}
    assert kinds == {"sparse24", "dense"}


def test_checkpoints_of_2024_hold_every_tensor_under_its_own_name(strand, tmp_path, logits_of):
    """Until compressed-tensors 0.8: norms and embeddings too, the parameter's name, another key in config.json."""
    dense, old = strand(BITMASK)
    tensors = load_file(dense / "model.safetensors")
    tensors["model.norm.weight"][3:9] = 0
    write(dense, tensors)
    write(old, {f"{n}.{p}": t for n, w in tensors.items() for p, t in slow_parts(w, w != 0, BITMASK).items()})
    config = json.loads((old / "config.json").read_text())
    config["compression_config"] = {"sparsity_config": config.pop("quantization_config")["sparsity_config"]}
    (old / "config.json").write_text(json.dumps(config))
    assert convert(old, tmp_path / "packed")["format"] == "packed"
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(dense))
    convert(old, tmp_path / "out", "dense")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys() and all(same_bits(found[name], tensors[name]) for name in tensors)
    assert_old_settings_are_gone(tmp_path / "out")


def test_settings_that_transformers_wrote_again(strand, tmp_path, logits_of):
    dense, old = strand(SPARSE24)
    told = settings_of(SPARSE24)
    inner = {"config_groups": {}, "format": "dense", "ignore": [], "kv_cache_scheme": None, "quant_method": "x"}
    configure(old, quantization_config={**told, "quantization_config": inner, "transform_config": {}})
    convert(old, tmp_path / "packed")
    assert torch.equal(logits_of(tmp_path / "packed"), logits_of(dense))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_settings_that_only_tell_of_zeros_are_dropped(key, strand, tmp_path, logits_of):
    dense, _ = strand(SPARSE24)
    wanted = logits_of(dense)
    told = settings_of(SPARSE24)
    configure(dense, **{key: {**told, "sparsity_config": {**told["sparsity_config"], "format": "dense"}}})
    for format in ("packed", "dense"):
        convert(dense, tmp_path / format, format)
        assert torch.equal(logits_of(tmp_path / format), wanted)
    assert_old_settings_are_gone(tmp_path / "dense")


def test_one_weight_is_read_at_a_time(strand, tmp_path):
    _, old = strand(SPARSE24)
    calls = []

    class WatchedFiles(TensorFiles):
        def read(self, names, finite=True):
            calls.append(list(names))
            return super().read(calls[-1], finite)

    class WatchedBitmaskFiles(BitmaskFiles):
        @cached_property
        def stored(self):
            return WatchedFiles(self.folder)

    source = ModelSource(old, "old", stranded=True)
    source.files = WatchedBitmaskFiles(old, SPARSE24)
    export_source(source, tmp_path / "packed", None, lambda done, total: None)
    values = [[name for name in names if name.endswith(".compressed")] for names in calls]
    assert max(map(len, values)) == 1 and sum(map(len, values)) >= 12


def test_the_command_chooses_packed_for_a_stranded_checkpoint_and_dense_for_ours(
    strand, tmp_path, capsys, monkeypatch, logits_of
):
    dense, old = strand(SPARSE24)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["paredown", "export", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return json.loads(capsys.readouterr().out)

    assert run(old, "-o", tmp_path / "packed")["format"] == "packed"
    assert run(tmp_path / "packed", "-o", tmp_path / "back")["format"] == "dense"
    assert run(old, "-o", tmp_path / "out", "--format", "dense")["format"] == "dense"
    wanted = logits_of(dense)
    assert all(torch.equal(logits_of(tmp_path / name), wanted) for name in ("packed", "back", "out"))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_all_other_commands_send_to_export(key, strand):
    _, old = strand(SPARSE24)
    configure(old, **{"quantization_config": None, key: settings_of(SPARSE24)})
    with pytest.raises(PareError, match=r"sparse-24-bitmask.*paredown export OLD -o NEW"):
        ModelSource(old, "old")


def refused(folder, tmp_path, said):
    with pytest.raises(PareError, match=said):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


GROUPS = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}}
BOTH = r"is quantised \(compressed-tensors, {}\), and stored as sparse-24-bitmask: there are no plain weights"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config_groups": GROUPS, "format": "float-quantized"}, BOTH.format("float-quantized")),
        ({"quantization_config": {"config_groups": GROUPS, "format": "int-quantized"}}, BOTH.format("int-quantized")),
        ({"config_groups": GROUPS}, BOTH.format("config_groups")),
        ({"format": "pack-quantized"}, BOTH.format("pack-quantized")),
        ({"kv_cache_scheme": {"num_bits": 8}}, BOTH.format("kv_cache_scheme")),
        ({"transform_config": {"config_groups": {"R1": {}}}}, BOTH.format("transform_config")),
        ({"config_groups": GROUPS, "format": "x", "sparsity_config": {}}, r"\(compressed-tensors, x\): there are no"),
        ({"sparsity_config": {"format": "marlin-48"}}, "format 'marlin-48' is unknown. We read sparse-24-bitmask and"),
        ({"quant_method": "gptq"}, r"quantised \(gptq\)"),
    ],
)
def test_what_is_quantised_as_well_is_refused(changes, said, strand, tmp_path):
    _, old = strand(SPARSE24)
    configure(old, quantization_config={**settings_of(SPARSE24), **changes})
    refused(old, tmp_path, said)


def test_quantised_settings_under_the_older_key_are_refused_by_all_commands(strand, tmp_path):
    dense, _ = strand(SPARSE24)
    configure(dense, compression_config={"config_groups": GROUPS, "format": "naive-quantized"})
    refused(dense, tmp_path, "is quantised")
    with pytest.raises(PareError, match="is quantised"):
        ModelSource(dense, "dense")


def flip(tensor, row, column):
    changed = tensor.clone()
    changed[row, column // 8] ^= 1 << (column % 8)
    return changed


def move_a_bit(bitmask):
    """From one group of a row to its neighbour: the number of bits stays."""
    marked = [bool(bitmask[3, c // 8] >> (c % 8) & 1) for c in range(8)]
    return flip(flip(bitmask, 3, marked.index(True)), 3, 4 + marked[4:].index(False))


DAMAGE = {
    "a bit too many": (BITMASK, "bitmask", lambda b: flip(b, 2, 7), r"bitmask' marks (\d+) weights, and (?!\1)\d+ values"),
    "a bit past the last column": (BITMASK, "bitmask", lambda b: flip(b, 0, 91), "bitmask' marks columns past the last of 90"),
    "a bit past the last group": (SPARSE24, "bitmask", lambda b: flip(b, 0, 101), "bitmask' marks columns past the last of 100"),
    "a value too few": (BITMASK, "compressed", lambda v: v[:-1], r"bitmask' marks (\d+) weights, and (?!\1)\d+ values"),
    "three of four": (SPARSE24, "bitmask", move_a_bit, "bitmask' does not mark two of every four columns in 1 rows"),
    "a column too few": (SPARSE24, "compressed", lambda v: v[:, :-1], r"compressed' has shape \[64, 49\].* needs \[64, 50\]"),
    "values in a row": (SPARSE24, "compressed", lambda v: v.flatten(), r"compressed' has shape \[3200\].* needs \[64, 50\]"),
    "values in a matrix": (BITMASK, "compressed", lambda v: v[None], "compressed' has shape"),
    "a row of bits too few": (BITMASK, "bitmask", lambda b: b[:-1], r"bitmask' has shape \[63, 12\].* needs \[64, 12\]"),
    "signed bytes": (SPARSE24, "bitmask", lambda b: b.view(torch.int8), "bitmask' has dtype torch.int8"),
    "another width": (SPARSE24, "shape", lambda s: s - torch.tensor([[0], [4]]), r"bitmask' has shape \[64, 13\].* needs \[64, 12\]"),
    "another height": (BITMASK, "shape", lambda s: s + torch.tensor([1, 0]), r"bitmask' has shape \[64, 12\].* needs \[65, 12\]"),
    "a width of odd groups": (SPARSE24, "shape", lambda s: s + 2, "shape' tells the shape .*groups of four"),
    "no shape": (BITMASK, "shape", lambda s: -s, "shape' tells the shape"),
    "half a shape": (BITMASK, "shape", lambda s: s / 2, "shape' tells the shape"),
    "offsets that disagree": (BITMASK, "row_offsets", lambda r: r.roll(1), "row_offsets' tells other beginnings"),
    "an offset too few": (BITMASK, "row_offsets", lambda r: r[1:], r"row_offsets' has shape \[63\].* needs \[64\]"),
    "no offsets": (BITMASK, "row_offsets", lambda r: None, "row_offsets' is missing"),
    "no bits": (SPARSE24, "bitmask", lambda b: None, "bitmask' is missing"),
    "no values": (SPARSE24, "compressed", lambda v: None, "compressed' is missing"),
    "not a number": (SPARSE24, "compressed", lambda v: v * float("nan"), "compressed' holds NaN"),
    "eight-bit floats": (SPARSE24, "compressed", lambda v: v.to(torch.float8_e4m3fn), "compressed' holds .* is quantised"),
    "eight-bit integers": (BITMASK, "compressed", lambda v: v.to(torch.int8), "compressed' holds .* is quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_an_error_that_names_the_tensor(case, strand, tmp_path):
    format, part, edit, said = DAMAGE[case]
    _, old = strand(format)
    tensors = load_file(old / "model.safetensors")
    made = edit(tensors.pop(f"{WEIGHT}.{part}"))
    write(old, tensors | ({} if made is None else {f"{WEIGHT}.{part}": made}))
    refused(old, tmp_path, rf"tensor '{WEIGHT}\.{said}")


def test_a_weight_that_is_there_twice_is_refused(strand, tmp_path):
    dense, old = strand(SPARSE24)
    name = f"{WEIGHT}.weight"
    write(old, load_file(old / "model.safetensors") | {name: load_file(dense / "model.safetensors")[name]})
    refused(old, tmp_path, f"'{name}' is stored twice")


def test_a_weight_that_is_gone_is_named(strand, tmp_path):
    _, old = strand(SPARSE24)
    write(old, {n: t for n, t in load_file(old / "model.safetensors").items() if not n.startswith(WEIGHT)})
    refused(old, tmp_path, f"1 tensors of a llama model are missing, first '{WEIGHT}.weight'")
