"""Runs that remove channels or blocks: what they write is an ordinary smaller model that computes what they say."""

import json
import math
import subprocess
import sys

import pytest
import torch
import transformers as t
import yaml
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, plan, verify
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.evaluation.schema import check_report

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
WIDTH = {"method": "paredown_width", "options": {"units": 32, "multiple": 8}}
DEPTH = {"method": "paredown_depth", "options": {"blocks": 2, "windows": 2}}
ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
probe = json.load(open(sys.argv[1] + "/paredown.json"))["probe"]
ids = torch.tensor([probe["ids"]])
logits = model(ids).logits[0, :-1].float()
nll = -logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
text = model.generate(ids[:, :4], max_new_tokens=4, do_sample=False)
print(json.dumps({"error": float((nll - torch.tensor(probe["nll"])).abs().max()), "tokens": text.shape[1],
                  "ours": [name for name in sys.modules if name.startswith("paredown")]}))
"""


@pytest.fixture
def model(tmp_path, save_model):
    save_model(tmp_path / "model", t.LlamaConfig(**SIZES), torch.float32)
    return tmp_path / "model"


@pytest.fixture
def run(run_raw):
    return run_raw


def layers_of(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return model.model.layers, model


@pytest.mark.parametrize("raw", [WIDTH, DEPTH], ids=["width", "depth"])
def test_what_comes_out_loads_and_generates_without_us_and_scores_what_the_run_saw(raw, model, run, tmp_path):
    report = run(model, raw)
    check_report(report)
    assert report["format"] == "dense" and verify(tmp_path / "out") == []
    done = subprocess.run([sys.executable, "-c", ALONE, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["error"] < 1e-4 and told["tokens"] == 8 and told["ours"] == []


def test_a_plan_says_what_the_run_writes(model, run, tmp_path):
    for out, raw in (("narrow", WIDTH), ("short", DEPTH)):
        path = tmp_path / f"{out}-plan.yaml"
        path.write_text(yaml.safe_dump(raw))
        planned, report = plan(model, str(path)), run(model, raw, out)
        assert planned.kept_parameters == report["parameters"]["kept"]
        assert planned.bytes_after == report["bytes"]["after"] < report["bytes"]["before"]
        assert any("ordinary llama checkpoint" in remark for remark in planned.remarks)
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    assert config["intermediate_size"] == 32 and config["num_hidden_layers"] == 4
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    assert config["intermediate_size"] == 48 and config["num_hidden_layers"] == 2


def test_channels_that_do_nothing_go_and_nothing_changes(model, run, tmp_path):
    layers, dense = layers_of(model)
    idle = torch.arange(48) % 3 == 0
    for layer in layers:
        layer.mlp.down_proj.weight.data[:, idle] = 0
    dense.save_pretrained(model)
    report = run(model, WIDTH)
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < 1e-5
    assert max(layer["relative_error"] for layer in report["layers"]) < 1e-9
    small, _ = layers_of(tmp_path / "out")
    for before, after in zip(layers, small, strict=True):
        torch.testing.assert_close(after.mlp.gate_proj.weight, before.mlp.gate_proj.weight[~idle])
    assert report["structure"] == {"blocks": [0, 1, 2, 3], "blocks_before": 4, "units": {"intermediate_size": [48, 32]}}


@pytest.mark.parametrize("method", ["greedy_depth", "paredown_depth", "shortgpt"])
def test_blocks_that_do_nothing_go_and_nothing_changes(method, model, run, tmp_path):
    layers, dense = layers_of(model)
    for i in (1, 2):
        layers[i].self_attn.o_proj.weight.data.zero_()
        layers[i].mlp.down_proj.weight.data.zero_()
    dense.save_pretrained(model)
    report = run(model, {"method": method, "options": {"blocks": 2}})
    assert report["structure"]["blocks"] == [0, 3]
    assert abs(report["evaluation"][0]["paired_delta"]["log_ratio"]) < 1e-5
    assert report["parameters"]["kept"] * 2 == report["parameters"]["targeted"]


def test_a_fit_towards_the_dense_stream_brings_predictions_nearer_to_the_dense_ones(model, run, tmp_path):
    """The same blocks go, and what stays takes on what a linear map can of them."""
    chosen = [run(model, {**DEPTH, "method": f"{who}_depth"}, who)["structure"] for who in ("greedy", "paredown")]
    assert chosen[0] == chosen[1]
    ids = torch.tensor([json.loads((tmp_path / "greedy" / "paredown.json").read_text())["probe"]["ids"]])
    dense, plain, fitted = (
        layers_of(f)[1](ids).logits.log_softmax(-1) for f in (model, tmp_path / "greedy", tmp_path / "paredown")
    )
    far, near = (float((dense.exp() * (dense - other)).sum(-1).mean()) for other in (plain, fitted))
    assert 0 < near < far


def test_flaps_bias_makes_up_for_the_mean_by_a_setting_of_the_family(model, run, tmp_path):
    report = run(model, {"method": "flap", "options": {"units": 32, "multiple": 8}})
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True
    small, _ = layers_of(tmp_path / "out")
    assert (
        float(small[0].mlp.down_proj.bias.detach().abs().sum()) > 0
        and float(small[0].mlp.up_proj.bias.detach().abs().sum()) == 0
    )
    assert not report["fallbacks"]
    report = run(model, {"method": "flap", "options": {"units": 32, "multiple": 8, "bias": False}}, "bare")
    assert (
        "mlp_bias" not in json.loads((tmp_path / "bare" / "config.json").read_text())
        or not json.loads((tmp_path / "bare" / "config.json").read_text())["mlp_bias"]
    )


@pytest.mark.parametrize("raw", [WIDTH, DEPTH], ids=["width", "depth"])
def test_blocks_are_tuned_towards_the_dense_ones(raw, model, run):
    notes = []
    run(model, {**raw, "reconstruct": {"steps": 3, "batch": 2}}, note=notes.append)
    told = [note for note in notes if note.startswith("reconstructed")]
    assert len(told) == (4 if raw is WIDTH else 2)


@pytest.mark.parametrize("raw", [WIDTH, DEPTH, {**WIDTH, "reconstruct": {"steps": 2, "batch": 2}}])
def test_an_interrupted_run_goes_on_to_the_same_bytes(raw, model, run, tmp_path):
    run(model, raw, "whole")

    class Stopped(Exception):
        pass

    def stop(done):
        if done.index >= 1:
            raise Stopped

    with pytest.raises(Stopped):
        run(model, raw, progress=stop, save_every=0.0)
    notes = []
    run(model, raw, note=notes.append, save_every=0.0)
    assert any("going on after" in note for note in notes)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_run_that_was_saved_before_its_first_block_goes_on_where_that_stands(model, run, tmp_path):
    layers, dense = layers_of(model)
    layers[0].self_attn.o_proj.weight.data.zero_()
    layers[0].mlp.down_proj.weight.data.mul_(1e-3)
    dense.save_pretrained(model)
    raw = {"method": "shortgpt", "options": {"blocks": 3}}
    assert run(model, raw, "whole")["structure"]["blocks"] == [1, 2, 3]

    class Stopped(Exception):
        pass

    def stop(doing):
        if doing.startswith("reading model.layers.1"):
            raise Stopped

    with pytest.raises(Stopped):
        run(model, raw, doing=stop, save_every=0.0)
    report = run(model, raw, save_every=0.0)
    assert weights(tmp_path / "out") == weights(tmp_path / "whole") and verify(tmp_path / "out") == []
    assert report["parameters"]["kept"] * 4 == report["parameters"]["targeted"] * 3


def weights(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


STAGES = [DEPTH, WIDTH, {"method": "magnitude", "options": {"sparsity": "2:4"}}]


def test_three_stages_are_one_run_with_one_report(model, run, tmp_path):
    report = run(model, {"stages": STAGES})
    check_report(report)
    assert report["structure"] == {
        "blocks": report["structure"]["blocks"],
        "blocks_before": 4,
        "units": {"intermediate_size": [48, 32]},
    }
    assert len(report["structure"]["blocks"]) == 2 and report["model"]["id"] == str(model)
    assert report["parameters"]["kept"] < report["parameters"]["targeted"] / 2
    dense, after = (
        entry["token_perplexity"] for entry in (report["evaluation"][0]["before"], report["evaluation"][0]["after"])
    )
    assert math.log(after / dense) == pytest.approx(report["evaluation"][0]["paired_delta"]["log_ratio"], abs=1e-6)
    alone = run(model, {"method": "magnitude", "options": {"sparsity": "2:4"}}, "alone")
    assert dense == pytest.approx(alone["evaluation"][0]["before"]["token_perplexity"], rel=1e-6)
    assert not (tmp_path / "out.stages").exists() and verify(tmp_path / "out") == []
    assert load_tokenizer(tmp_path / "out")


def test_a_plan_of_stages_is_of_the_first_and_names_the_others(model, tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump({"stages": STAGES}))
    planned = plan(model, str(path))
    assert planned.remarks[-1] == "this is the first of 3 stages; then paredown_width, magnitude"
    assert planned.kept_parameters * 2 == planned.targeted_parameters


def test_a_setting_of_one_stage_is_changed_by_its_number(model, tmp_path):
    path = tmp_path / "stages.yaml"
    path.write_text(yaml.safe_dump({"stages": STAGES}))
    planned = plan(model, str(path), overrides=["stages.0.options.blocks=3"])
    assert planned.kept_parameters * 4 == planned.targeted_parameters * 3
    with pytest.raises(PareError, match="name a stage by its number"):
        plan(model, str(path), overrides=["stages.blocks=3"])


def test_stages_go_on_where_they_were_stopped(model, run, tmp_path):
    run(model, {"stages": STAGES}, "whole")
    calls = []

    class Stopped(Exception):
        pass

    def stop(done):
        calls.append(done)
        if len(calls) == 4:  # in the second stage
            raise Stopped

    with pytest.raises(Stopped):
        run(model, {"stages": STAGES}, progress=stop, save_every=0.0)
    again = []
    run(model, {"stages": STAGES}, progress=again.append, save_every=0.0)
    assert len(calls) + len(again) < 2 + 2 + 2 + 4
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({**WIDTH, "allocation": {"strategy": "owl"}}, "allocation is about single weights"),
        ({**WIDTH, "targets": {"include": ["*mlp*"]}}, "targets is about single weights"),
        ({"method": "minitron", "options": {"units": 48}}, "of the 48 units of intermediate_size 48 would stay"),
        ({"method": "minitron", "options": {"kept": 0.1}}, "would stay"),
        ({"method": "tail", "options": {"blocks": 4}}, "ask for 1 to 3"),
        ({"stages": STAGES, "method": "wanda"}, "method beside stages"),
        ({"stages": [{"method": "minitron", "options": {"kept": 2}}]}, "stages.0: minitron.kept"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(raw, told, model, run, tmp_path):
    with pytest.raises(PareError, match=told):
        run(model, raw)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_whose_width_no_setting_names_is_refused(tmp_path, save_model, run):
    save_model(tmp_path / "bloom", t.BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(PareError, match="no setting of a bloom config"):
        run(tmp_path / "bloom", WIDTH)
