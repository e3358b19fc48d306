"""`merge` from a compressed folder and an adapter to a new folder of the same form."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.compress import merge
from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.errors import PareError
from paredown.compress.run.verify import verify
from paredown.compress.serving.adapters import enable_peft
from paredown.evaluation.report import render

LAYERS = ["self_attn.q_proj", "mlp.down_proj"]
SIZES = {"self_attn.q_proj": (32, 32), "mlp.down_proj": (32, 48)}
FORMS = ("2:4", "dense", "lowrank", "pifa", "blocks")


@pytest.fixture(scope="session")
def dense(lively):
    return lively(dtype=torch.float32)


@pytest.fixture(scope="session")
def compressed(lively):
    """`compressed(form)`: that model, compressed."""
    return lambda form="2:4": lively(form, torch.float32)


@pytest.fixture
def adapter(tmp_path):
    """`adapter(...)`: a folder such as peft writes, with random matrices."""

    def make(blocks=(0, 1), layers=LAYERS, rank=4, extra=(), **config):
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        generator, tensors = torch.Generator().manual_seed(0), dict(extra)
        for layer in (f"model.layers.{i}.{name}" for i in blocks for name in layers):
            out, inner = SIZES[layer.split(".", 3)[3]]
            tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, inner, generator=generator)
            tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.05
        save_file(tensors, folder / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "base_model_name_or_path": "dense",
            **config,
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        return folder

    return make


def weights(folder):
    """Dense weights of all layers as transformers loads them."""
    model = transformers_plugin.load(folder, dtype=torch.float32)
    return {name: m.weight.detach().clone() for name, m in model.named_modules() if name.endswith("_proj")}


def update_of(folder, layer, scale=2.0):
    tensors = load_file(folder / "adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{layer}.lora_{part}.weight"] for part in "BA")
    return scale * up @ down


@pytest.mark.parametrize("form", FORMS)
def test_a_merged_checkpoint_is_sound_and_has_the_form_that_it_had(
    form, dense, compressed, adapter, tmp_path, verified_here
):
    folder = adapter((0,) if form == "blocks" else (0, 1))
    report = merge(compressed(form), folder, tmp_path / "out")
    assert verify(tmp_path / "out") == []
    one, other = (load_file(path / "model.safetensors") for path in (compressed(form), tmp_path / "out"))
    assert {n: (t.shape, t.dtype) for n, t in one.items()} == {n: (t.shape, t.dtype) for n, t in other.items()}
    before, after = weights(compressed(form)), weights(tmp_path / "out")
    for name, weight in before.items():
        if name.split(".", 3)[3] not in LAYERS:
            assert torch.equal(weight, after[name])
            continue
        change = update_of(folder, name)
        if form in ("2:4", "dense"):
            change *= weight != 0
        if form in ("lowrank", "pifa"):
            rank = torch.linalg.matrix_rank(weight, rtol=1e-4)
            left, sizes, right = torch.linalg.svd((weight + change).double())
            assert torch.allclose(after[name].double(), left[:, :rank] * sizes[:rank] @ right[:rank], atol=1e-3)
        else:
            assert torch.allclose(after[name], weight + change, atol=1e-5)
    kinds = {"2:4": "sparse24", "dense": "dense", "blocks": "dense"}
    (merged,) = report["adapters"]
    assert {part["part"] for part in merged["parts"]} == set(LAYERS)
    assert {part["kind"] for part in merged["parts"]} == {kinds.get(form, form)}
    lost = {part["lost"] for part in merged["parts"]}
    assert lost == {0.0} if form == "blocks" else all(0.05 < share < 0.9 for share in lost)


def test_the_way_is_told_and_the_old_scores_are_not(compressed, adapter, tmp_path, verified_here):
    folder = adapter()
    report = merge(compressed(), folder, tmp_path / "one", command="paredown merge")
    again = merge(tmp_path / "one", folder, tmp_path / "two")
    assert len(report["adapters"]) == 1 and len(again["adapters"]) == 2
    assert json.loads((tmp_path / "two" / "report.json").read_text()) == again
    record = json.loads((tmp_path / "two" / "paredown.json").read_text())
    assert [entry["adapter"] for entry in record["adapters"]] == [str(folder)] * 2
    assert record["layers"] and record["recipe"]["method"] == "wanda"
    assert report["evaluation"] == [] and any("paredown eval" in text for text in report["warnings"])
    card = (tmp_path / "two" / "README.md").read_text()
    assert "adapter was merged into 4 layers" in card and "stored as sparse24: of the update's norm" in card
    assert render(report)
    probe = json.loads((compressed() / "paredown.json").read_text())["probe"]
    assert record["probe"]["ids"] == probe["ids"] and record["probe"]["nll"] != probe["nll"]


def test_scales_are_those_of_peft(dense, adapter, tmp_path, verified_here):
    folder = adapter(use_rslora=True, alpha_pattern={"layers.1.self_attn.q_proj": 3.0}, rank_pattern={"down_proj": 4})
    merge(dense, folder, tmp_path / "out")
    before, after = weights(dense), weights(tmp_path / "out")
    for name, scale in (
        ("model.layers.0.mlp.down_proj", 8 / math.sqrt(4)),
        ("model.layers.1.self_attn.q_proj", 3 / math.sqrt(4)),
    ):
        assert torch.allclose(after[name], before[name] + update_of(folder, name, scale), atol=1e-5)


def test_an_adapter_that_peft_saved_is_merged_as_peft_does(compressed, tmp_path, verified_here):
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'peft>=0.21,<0.22'")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(transformers_plugin.load(compressed(), dtype=torch.float32), enable_peft(config))
    model.save_pretrained(tmp_path / "adapter")
    merge(compressed(), tmp_path / "adapter", tmp_path / "out")
    theirs, ours = model.merge_and_unload(), weights(tmp_path / "out")
    assert all(torch.equal(theirs.get_submodule(name).weight, weight) for name, weight in ours.items())


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"blocks": (0, 1, 2)}, r"update of 'model.layers.2.mlp.down_proj', and .* has none of that name.*another model"),
        ({"config": {"use_dora": True}}, "has use_dora, which packed layers do not support"),
        ({"config": {"peft_type": "IA3"}}, "only LORA adapters"),
        ({"config": {"init_lora_weights": "pissa"}}, "init_lora_weights='pissa' changes the weight below"),
        ({"config": {"modules_to_save": ["lm_head"]}}, "has modules_to_save, and only pairs"),
        ({"config": {"bias": "all"}}, "trains the model's own biases"),
        ({"config": {"r": None}}, "does not say r and lora_alpha"),
        ({"extra": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 3)}}, "is no part of a LoRA pair"),
        ({"extra": {"base_model.model.model.norm.lora_A.weight": torch.ones(2, 3)}}, "one matrix alone of model.norm"),
        ({"extra": {f"base_model.model.model.norm.lora_{p}.weight": torch.ones(3, 3) for p in "AB"}}, "a LlamaRMSNorm there"),
        ({"extra": {f"base_model.model.lm_head.lora_{p}.weight": torch.ones(s) for p, s in zip("AB", [(1, 32), (320, 1)], strict=True)}},
         "shares its weight with another layer"),
        ({"extra": {f"base_model.model.model.layers.0.self_attn.k_proj.lora_{p}.weight": torch.ones(3, 3) for p in "AB"}},
         r"matrices of .*k_proj are \[3, 3\] and \[3, 3\], and its weight in .* is \[16, 32\]"),
        ({"extra": {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(32)}}, "has none there"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_is_refused(made, said, compressed, adapter, tmp_path):
    folder = adapter(**{key: value for key, value in made.items() if key != "config"}, **made.get("config", {}))
    with pytest.raises(PareError, match=said):
        merge(compressed(), folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_is_refused(compressed, adapter, tmp_path):
    with pytest.raises(PareError, match=r"holds no adapter_config\.json"):
        merge(compressed(), tmp_path, tmp_path / "out")
    folder = adapter()
    (folder / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(PareError, match=r"adapter_model\.safetensors cannot be read"):
        merge(compressed(), folder, tmp_path / "out")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(PareError, match=r"has no adapter_model\.safetensors"):
        merge(compressed(), folder, tmp_path / "out")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(PareError, match=r"adapter_config\.json cannot be read"):
        merge(compressed(), folder, tmp_path / "out")


def test_an_update_that_is_not_finite_is_refused(compressed, adapter, tmp_path):
    broken = {"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": torch.full((32, 4), math.nan)}
    folder = adapter()
    tensors = {**load_file(folder / "adapter_model.safetensors"), **broken}
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(PareError, match="is not finite: it was saved from a training that diverged"):
        merge(compressed(), folder, tmp_path / "out")
