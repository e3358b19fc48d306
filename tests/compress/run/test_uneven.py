"""Runs after which blocks have sizes of their own: what is written, what loads it, and what can be made of it next."""

import json
import subprocess
import sys
from shutil import copytree

import pytest
import torch
import transformers as t
import yaml

from paredown.compress import PareError, bench, compress, evaluate, export, load, plan, verify
from paredown.compress.checkpoint.source import ModelSource
from paredown.evaluation.card import model_card
from paredown.evaluation.schema import check_report
from paredown.evaluation.speed import Settings

S = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "pad_token_id": 256, "initializer_range": 0.2,
}  # fmt: skip
GPT2 = t.GPT2Config(
    vocab_size=320,
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_inner=48,
    n_positions=64,
    bos_token_id=256,
    eos_token_id=256,
    initializer_range=0.2,
)
FAMILIES = {
    "gpt2": GPT2,
    "phi3": t.Phi3Config(**S),
    "qwen3": t.Qwen3Config(**S, head_dim=8),
    "bloom": t.BloomConfig(
        vocab_size=320, hidden_size=32, n_layer=3, n_head=4
    ),  # no setting of it says how wide MLPs are
}
DIRECT = {"method": "paredown_width", "options": {"kept": 0.9, "multiple": 4, "widths": "direct", "shrink": 0}}
PRUNED = {"method": "wanda", "options": {"sparsity": "2:4"}}
SHORTER = {"method": "shortgpt", "options": {"blocks": 3}}
WITHOUT = {"method": "block_pruner", "options": {"drop": 2, "windows": 2}}
UNEVEN = "per-layer sizes: packed format, loads with paredown; paredown export --format deci for Llama-shaped models"
FRESH = """
import json, sys
import torch
import paredown.compress
from transformers import AutoModelForCausalLM
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
model.save_pretrained(again)
twin = AutoModelForCausalLM.from_pretrained(again).eval()
probe = json.load(open(folder + "/paredown.json"))["probe"]
ids = torch.tensor([probe["ids"]])
with torch.no_grad():
    logits, same = model(ids).logits, twin(ids).logits
nll = -logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
texts = [model.generate(ids[:, :6], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=c) for c in (True, False)]
print(json.dumps({"error": float((nll - torch.tensor(probe["nll"])).abs().max()), "same": torch.equal(logits, same),
                  "cached": torch.equal(*texts), "tokens": texts[0].shape[1]}))
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory, save_model):
    folder = tmp_path_factory.mktemp("dense") / "model"
    save_model(folder, t.LlamaConfig(**S), torch.float32)
    return folder


@pytest.fixture(scope="module")
def narrowed(llama, tmp_path_factory, text_file):
    """The Llama with widths of its own in each block."""
    place = tmp_path_factory.mktemp("uneven")
    (place / "r.yaml").write_text(yaml.safe_dump(DIRECT))
    small = ("calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=4")
    compress(
        llama,
        str(place / "r.yaml"),
        place / "out",
        overrides=small,
        calibration=str(text_file),
        eval_text=[str(text_file)],
        allow_scored_calibration=True,
    )
    return place / "out"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_run_says_the_sizes_in_config_and_report_and_loads_as_they_are(narrowed, llama):
    report = json.loads((narrowed / "report.json").read_text())
    check_report(report)
    sizes, stored = report["structure"]["sizes"], config_of(narrowed)["quantization_config"]
    assert (
        report["format"] == "packed" and report["structure"]["units"] == {} and len({s[1] for s in sizes.values()}) > 1
    )
    assert stored["modules"] == {} and config_of(narrowed)["intermediate_size"] == 48
    model = load(narrowed)
    for i, layer in enumerate(model.model.layers):
        before, after = sizes[f"model.layers.{i}.mlp"]
        mlp = layer.mlp
        assert (before, after) == (48, mlp.down_proj.in_features) and mlp.gate_proj.weight.shape == (after, 32)
        assert stored["sizes"].get(f"model.layers.{i}.mlp.down_proj.weight", [32, 48]) == [32, after]
    numbers = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert numbers == report["parameters"]["kept"] < report["parameters"]["targeted"]
    card = model_card(report)
    assert "per-layer sizes" in card and "import paredown.compress" in card
    assert verify(narrowed) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_get_sizes_of_their_own(family, tmp_path, save_model, run_raw):
    save_model(tmp_path / "m", FAMILIES[family], torch.float32)
    report = run_raw(tmp_path / "m", DIRECT)  # which verifies it
    kept = {pair[1] for pair in report["structure"]["sizes"].values()}
    assert len(kept) > 1 and config_of(tmp_path / "out")["model_type"] == f"paredown_{FAMILIES[family].model_type}"
    if family == "gpt2":  # whose weights are (in, out)
        run_raw(tmp_path / "out", PRUNED, "packed")
        stored = config_of(tmp_path / "packed")["quantization_config"]
        assert len(stored["modules"]) == 4 * 3 and stored["sizes"]


def test_a_fresh_process_loads_saves_and_generates_with_a_cache(narrowed, run_raw, tmp_path):
    report = run_raw(narrowed, WITHOUT)
    absent = report["structure"]["absent"]
    assert len(absent) == 2 and config_of(tmp_path / "out")["quantization_config"]["absent"] == sorted(absent)
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "out"), str(tmp_path / "again")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["error"] < 1e-4 and told["same"] and told["cached"] and told["tokens"] == 18


def test_attention_that_is_absent_behind_the_first_block_does_not_hinder_the_cache(llama, run_raw, tmp_path):
    raw = {"method": "block_pruner", "options": {"drop": 3, "windows": 2, "which": "attention"}}
    absent = run_raw(llama, raw)["structure"]["absent"]
    assert sorted(absent) == [f"model.layers.{i}.self_attn" for i in (1, 2, 3)]
    model, ids = (
        load(tmp_path / "out").eval(),
        torch.randint(3, 250, (2, 7), generator=torch.Generator().manual_seed(0)),
    )
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 2}):
        one, other = (model.generate(ids, use_cache=cache, **options, **more) for cache in (True, False))
        assert torch.equal(one, other) and one.shape == (2, 19)


OVER = {
    "low rank": ({"method": "paredown_lowrank", "options": {"kept": 0.7}}, None),
    "blocks": (SHORTER, {"blocks"}),
    "the same share of each": ({"method": "minitron", "options": {"kept": 0.9, "multiple": 4}}, {"sizes"}),
    "a bias": ({"method": "flap", "options": {"kept": 0.9, "multiple": 4}}, {"sizes"}),
}


@pytest.mark.parametrize("case", OVER)
def test_any_method_works_on_such_a_checkpoint(case, narrowed, run_raw, tmp_path):
    raw, changed = OVER[case]
    before, report = config_of(narrowed)["quantization_config"]["sizes"], run_raw(narrowed, raw)
    after = config_of(tmp_path / "out")["quantization_config"]
    assert report["format"] == "packed" and verify(tmp_path / "out") == []
    if changed is None:
        assert after["sizes"] == before and after["modules"]
    elif "sizes" in changed:
        assert set(before) <= set(after["sizes"]) and after["sizes"] != before
        layer = load(tmp_path / "out").model.layers[1].mlp.down_proj
        assert (layer.bias is not None) == (case == "a bias") and layer.in_features == layer.weight.shape[1]
    else:
        kept = report["structure"]["blocks"]
        of = {i: before.get(f"model.layers.{old}.mlp.down_proj.weight") for i, old in enumerate(kept)}
        assert {i: after["sizes"].get(f"model.layers.{i}.mlp.down_proj.weight") for i in range(3)} == of


def test_it_is_evaluated_and_timed_like_any_other(narrowed, llama, text_file, tmp_path):
    report = json.loads((narrowed / "report.json").read_text())["evaluation"][0]["after"]
    own = evaluate(narrowed, llama, eval_text=[str(text_file)], length=32, windows=4)["evaluation"][0]
    assert own["after"]["token_perplexity"] == pytest.approx(report["token_perplexity"], rel=1e-5)
    times = bench(narrowed, llama, settings=Settings((1,), context=16, decode=8, repeats=1))
    assert times["model"] == str(narrowed)


def test_a_plan_says_which_form_comes_out(llama, narrowed, tmp_path):
    (tmp_path / "direct.yaml").write_text(yaml.safe_dump(DIRECT))
    (tmp_path / "pruned.yaml").write_text(yaml.safe_dump(PRUNED))
    planned = plan(llama, str(tmp_path / "direct.yaml"))
    assert f"({UNEVEN})" in planned.remarks[-1] and "of 192 channels" in planned.remarks[-1]
    report = json.loads((narrowed / "report.json").read_text())
    assert planned.kept_parameters == pytest.approx(report["parameters"]["kept"], rel=0.02)
    over = plan(narrowed, str(tmp_path / "pruned.yaml"))
    assert UNEVEN in over.remarks and over.dense_export.startswith("does not work")


def test_an_ordinary_checkpoint_of_it_is_refused(llama, narrowed, run_raw, tmp_path):
    for model, raw in ((llama, DIRECT), (narrowed, PRUNED)):
        with pytest.raises(PareError, match="no config of a llama model says so"):
            run_raw(model, raw, format="dense")
        with pytest.raises(PareError, match="no config of a llama model says so"):
            plan(model, str(tmp_path / "out.yaml"), format="dense")
    with pytest.raises(PareError, match="sizes of their own"):
        export(narrowed, tmp_path / "dense", format="dense")


def test_it_is_refused_at_the_stage_that_would_leave_none(llama, run_raw, tmp_path):
    with pytest.raises(PareError, match="no config of a llama model says so"):
        run_raw(llama, {"stages": [DIRECT, SHORTER]}, format="dense")
    assert not list(tmp_path.glob("out.stages/*/config.json"))


def test_weights_that_are_packed_already_stay_so_and_lose_no_units(narrowed, run_raw, tmp_path):
    run_raw(narrowed, {**PRUNED, "targets": {"include": ["*mlp*"]}})
    run_raw(tmp_path / "out", {**PRUNED, "targets": {"include": ["*self_attn*"]}}, "whole")
    first, both = (config_of(tmp_path / name)["quantization_config"] for name in ("out", "whole"))
    assert len(first["modules"]) == 3 * 4 and len(both["modules"]) == 7 * 4 and first["sizes"] == both["sizes"]
    with pytest.raises(PareError, match="has packed weights"):
        run_raw(tmp_path / "out", DIRECT, "again")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda tables: tables.pop("sizes"), "config.json wants"),
        (lambda tables: tables.update(absent=["model.layers.1.mpl"]), "Did you mean 'model.layers.1.mlp'"),
        (lambda tables: tables.update(sizes={"model.norm.weight": [64]}), "'model.norm.weight'.*no smaller form"),
    ],
    ids=["lost", "unknown", "too large"],
)
def test_tables_that_are_not_of_these_files_are_told(change, why, narrowed, tmp_path):
    copytree(narrowed, tmp_path / "damaged")
    config = config_of(narrowed)
    change(config["quantization_config"])
    (tmp_path / "damaged" / "config.json").write_text(json.dumps(config))
    with pytest.raises(PareError, match=why):
        ModelSource(tmp_path / "damaged", "damaged")
    with pytest.raises((PareError, RuntimeError), match=f"{why}|mismatch"):
        load(tmp_path / "damaged")


class Stopped(Exception):
    pass


def stopping(after):
    seen = []

    def stop(done):
        seen.append(done)
        if len(seen) == after:
            raise Stopped

    return stop


def test_an_interrupted_run_goes_on_to_the_same_bytes(llama, narrowed, run_raw, tmp_path):
    with pytest.raises(Stopped):
        run_raw(llama, DIRECT, progress=stopping(2), save_every=0.0)
    notes = []
    run_raw(llama, DIRECT, note=notes.append, save_every=0.0)
    assert any("going on after" in note for note in notes) and not any("widths" in note for note in notes)
    assert weights(tmp_path / "out") == weights(narrowed)
    assert config_of(tmp_path / "out") == config_of(narrowed)


def test_stages_over_it_are_one_run_with_one_report_and_go_on_where_they_were_stopped(llama, run_raw, tmp_path):
    raw = {"stages": [DIRECT, SHORTER, WITHOUT, PRUNED]}
    report = run_raw(llama, raw, "whole")
    check_report(report)
    structure = report["structure"]
    (gone,) = set(range(4)) - set(structure["blocks"])
    assert structure["blocks_before"] == 4 and sorted(structure["sizes"]) == [f"model.layers.{i}.mlp" for i in range(3)]
    stored = config_of(tmp_path / "whole")["quantization_config"]
    assert structure["absent"] == stored["absent"] and stored["modules"] and stored["sizes"]
    with pytest.raises(Stopped):
        run_raw(llama, raw, progress=stopping(4 + 4 + 3 + 2), save_every=0.0)
    run_raw(llama, raw, save_every=0.0)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "whole") and gone in range(4)
