"""Layers that collapse into one: the formula, and what a merge does to the whole model, against slow loops."""

from copy import deepcopy

import pytest
import torch
import transformers as t
from transformers import AutoModelForCausalLM

from paredown.compress import PareError, verify
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.methods import build
from paredown.compress.methods.base import Profile
from paredown.compress.methods.structured.laco import STEP, collapsed
from paredown.compress.model import stream as stream_module
from paredown.compress.model.blocks import blocks
from paredown.compress.survey.depth import profile, profile_bytes
from paredown.evaluation.report import shape_words

C = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 256, "eos_token_id": 256,
    "initializer_range": 0.2,
}  # fmt: skip
IDS = torch.randint(3, 256, (5, 14), generator=torch.Generator().manual_seed(0))
LACO = {"method": "laco", "options": {"blocks": 3, "merge": 3, "windows": 4}}


def merge_of(layers, at, more):
    """theta_l + sum_k (theta_{l+k} - theta_l), in place of layers at to at + more."""
    new = deepcopy(layers[at])
    for name, parameter in new.named_parameters():
        own = layers[at].get_parameter(name).data.double()
        total = own.clone()
        for k in range(1, more + 1):
            total += layers[at + k].get_parameter(name).data.double() - own
        parameter.data = total.to(parameter.dtype)
    return [*layers[:at], new, *layers[at + more + 1 :]]


def slow_laco(model, ids, stay, threshold, merge=4, interval=2, lowest=1):
    """The layers that stay, by the procedure of the paper on the whole model, until only `stay` are left."""
    dense = model.model(ids, use_cache=False).last_hidden_state.double()
    while True:
        layers = list(model.model.layers)
        at = max(len(layers) - merge, lowest)
        while at >= lowest and len(layers) > stay:
            tried = merge_of(layers, at, min(merge - 1, len(layers) - at - 1, len(layers) - stay))
            whole = deepcopy(model)
            whole.model.layers = torch.nn.ModuleList(tried)
            states = whole.model(ids, use_cache=False).last_hidden_state.double()
            cosines = [
                torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) for a, b in zip(dense, states, strict=True)
            ]
            if float(sum(cosines) / len(cosines)) > threshold:
                layers, at = tried, min(at - interval, len(tried) - merge)
            else:
                at -= 1
        if len(layers) == stay:
            return layers
        threshold -= STEP


@pytest.fixture
def llama(tmp_path, save_model):
    return save_model(tmp_path / "model", t.LlamaConfig(**C), torch.float64)


@pytest.mark.parametrize(("stay", "threshold", "merge"), [(5, 0.8, 4), (3, 0.5, 3)])
@torch.no_grad()
def test_the_layers_are_those_of_the_papers_procedure_on_the_whole_model(
    stay, threshold, merge, llama, tmp_path, monkeypatch
):
    monkeypatch.setitem(stream_module.BATCH_TOKENS, "cpu", 28)
    source = ModelSource(tmp_path / "model", "m")
    method = build("laco", {"blocks": stay, "threshold": threshold, "merge": merge, "windows": 4})
    measured = profile(source, blocks(source), IDS, method, 6 - stay)
    found = method.stay(measured, 6, 6 - stay)
    wanted = slow_laco(llama, IDS[:4], stay, threshold, merge)
    for mix, layer in zip(found, wanted, strict=True):
        for name, parameter in layer.named_parameters():
            total = sum(w * llama.model.layers[i].get_parameter(name) for i, w in mix)
            torch.testing.assert_close(total, parameter, rtol=1e-9, atol=1e-9)
    kept = [mix[0][0] for mix in found]
    assert method.choose(measured, 6, 6 - stay) == [i for i in range(6) if i not in kept]
    greedy = build("greedy_depth", {"blocks": 2, "windows": 4})
    assert profile_bytes(source, method, 6, 20, 10) == profile_bytes(source, greedy, 6, 20, 10)


def test_a_merge_of_merged_layers_adds_up_the_differences():
    one = collapsed([((2, 1.0),), ((3, 1.0),), ((4, 1.0),)])
    assert one == ((2, -1.0), (3, 1.0), (4, 1.0))
    assert collapsed([((1, 1.0),), one]) == ((1, 0.0), (2, -1.0), (3, 1.0), (4, 1.0))


def test_the_threshold_is_lowered_until_enough_are_gone_and_no_further():
    asked = []

    def similar(stay):
        asked.append(len(stay))
        return 0.72 if stay[1] == collapsed([((1, 1.0),), ((2, 1.0),)]) else 0.1

    stay = build("laco", {"blocks": 5, "merge": 2}).stay(Profile(similar=similar), 6, 1)
    assert [mix[0][0] for mix in stay] == [0, 1, 3, 4, 5] and len(stay[1]) == 2
    assert asked == [5] * 4 * 5  # 0.9, 0.85, 0.8, 0.75 and 0.7


def test_a_range_in_which_too_few_layers_lie_is_refused():
    with pytest.raises(PareError, match="of 6 blocks 5 stay when all merges are made"):
        build("laco", {"blocks": 2, "merge": 2, "lowest": 4}).stay(Profile(similar=lambda stay: 1.0), 6, 4)


def test_a_run_writes_the_sums_and_goes_on_to_the_same_bytes_after_a_stop(tmp_path, save_model, run_raw):
    save_model(tmp_path / "model", t.LlamaConfig(**C), torch.float32)
    notes = []
    report = run_raw(tmp_path / "model", LACO, "whole", note=notes.append)
    stay, merged = report["structure"]["blocks"], report["structure"]["merged"]
    assert len(stay) == 3 and any("similarity" in note for note in notes)
    assert sorted(i for group in merged for i in group[1:]) == [i for i in range(6) if i not in stay]
    assert all(group[0] in stay for group in merged)
    assert f"{', '.join(map(str, merged[0]))} became one block" in shape_words(report)

    class Stopped(Exception):
        pass

    def stop(done):
        raise Stopped

    with pytest.raises(Stopped):
        run_raw(tmp_path / "model", LACO, progress=stop, save_every=0.0)
    run_raw(tmp_path / "model", LACO, save_every=0.0)
    whole, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("whole", "out"))
    assert whole == again and verify(tmp_path / "out") == []
    dense, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name).model.layers for name in ("model", "out"))
    kept = [*report["structure"]["blocks"], 6]
    for n, layer in enumerate(small):
        assert (kept[n + 1] - kept[n] == 1) == torch.equal(layer.mlp.up_proj.weight, dense[kept[n]].mlp.up_proj.weight)


def test_layers_of_other_shapes_are_refused_by_name(tmp_path, save_model):
    config = t.Qwen2MoeConfig(
        **C, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
        mlp_only_layers=[3],
    )  # fmt: skip
    save_model(tmp_path / "model", config, torch.float32)
    source, method = ModelSource(tmp_path / "model", "m"), build("laco", {"blocks": 5})
    with pytest.raises(PareError, match=r"model.layers.2 and model.layers.3 have weights of different shapes"):
        method.stay(profile(source, blocks(source), IDS, method, 1), 6, 1)
