"""The models that decoding is measured on: one set of random weights, packed and dense."""

import subprocess
import sys

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.skeleton import skeleton
from paredown.compress.errors import PareError
from paredown.compress.storage.modules import PackedLinear
from paredown.evaluation.benchmarks import decode

CPU = torch.device("cpu")
PUBLISHED = {"llama-3-8b": 8_030_261_248, "llama-3.2-1b": 1_235_814_400}  # parameters, of Meta's checkpoints


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request, monkeypatch):
    monkeypatch.setitem(decode.SHAPES, "tiny", {**decode.SHAPES["tiny"], "tie_word_embeddings": request.param})
    return request.param


@pytest.fixture(params=decode.KINDS)
def models(request, tied):
    return decode.make_models("tiny", request.param, 0.5, CPU)


def test_the_packed_model_computes_what_the_dense_one_and_an_ordinary_llama_of_its_weights_compute(models, tied):
    ids = torch.randint(320, (2, 24), generator=torch.Generator().manual_seed(0))
    packed, dense = models["model"], models["against"]
    ordinary = t.LlamaForCausalLM(t.LlamaConfig(**decode.SHAPES["tiny"])).to(torch.bfloat16).eval()
    ordinary.load_state_dict(dense.state_dict())
    with torch.no_grad():
        wanted = ordinary.float()(ids).logits
        rounded = {name: model(ids).logits.float() for name, model in models.items()}
        scrambled = ordinary(ids.roll(7, dims=1)).logits
    assert (scrambled - wanted)[:, 16:].norm() > 0.5 * wanted[:, 16:].norm()  # tokens and their places matter
    for name, logits in rounded.items():
        assert (logits - wanted).norm() < 0.03 * wanted.norm(), name
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 2 * 7
    assert not any(p.is_meta for model in models.values() for p in (*model.parameters(), *model.buffers()))


def test_both_models_share_what_is_not_packed(models, tied):
    packed, dense = (dict(models[name].named_parameters(remove_duplicate=False)) for name in ("model", "against"))
    outside = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    assert all(packed[name].data_ptr() == dense[name].data_ptr() for name in outside)
    assert (packed[outside[0]].data_ptr() == packed[outside[1]].data_ptr()) == tied


def test_dense_weights_are_what_the_packed_ones_unpack_to(models):
    dense = models["against"]
    for name, module in models["model"].named_modules():
        if isinstance(module, PackedLinear):
            weight = dense.get_submodule(name).weight
            assert module.fault() is None
            assert (module.group is None) == name.endswith(("o_proj", "down_proj"))
            torch.testing.assert_close(module.weight, weight, rtol=1e-2, atol=1e-3)
            assert 0.4 < weight.float().square().sum(1).mean() < 1.2  # neither fades nor explodes from block to block


@pytest.mark.parametrize("shape", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_the_model_it_is_named_after(shape):
    model = skeleton(t.LlamaConfig(**decode.SHAPES[shape]), {}, torch.bfloat16)
    named = dict(model.named_parameters())
    assert sum(named[name].numel() for name in named.keys() - model.all_tied_weights_keys) == PUBLISHED[shape]
    assert all(parameter.is_meta for parameter in named.values())


@pytest.mark.parametrize("kind", ["pifa", "lowrank"])
def test_factors_keep_the_share_that_is_asked_for(kind):
    for kept in (0.3, 0.5, 0.8):
        rank = decode.spec_of(kind, (96, 64), kept).rank
        stored = {r: r * (96 + 64 - (r if kind == "pifa" else 0)) for r in (rank, rank + 1)}
        assert stored[rank] <= kept * 96 * 64 < stored[rank + 1]


@pytest.mark.parametrize(("kind", "kept"), [("sparse24", 0.6), ("pifa", 1e-4), ("lowrank", 1.0), ("lowrank", 0.0)])
def test_a_share_that_cannot_be_kept_is_refused(kind, kept):
    with pytest.raises(PareError, match=f"--kept {kept:g}"):
        decode.spec_of(kind, (96, 64), kept)


def test_the_bar_is_missed_only_where_it_is_set():
    there = ("llama-3-8b", "sparse24", 1, "NVIDIA H100 80GB HBM3")
    told, missed = decode.verdict(1.44, *there)
    assert missed and told.endswith("MISSED") and "1.44x" in told and "1.45x" in told
    assert decode.verdict(1.46, *there)[1] is False and decode.verdict(1.46, *there)[0].endswith(": met")
    for place, other in enumerate(("llama-3.2-1b", "pifa", 8, "NVIDIA A100")):
        elsewhere = (*there[:place], other, *there[place + 1 :])
        assert decode.verdict(0.5, *elsewhere) == (decode.verdict(0.5, *elsewhere)[0], False)
        assert "not asked of this run" in decode.verdict(0.5, *elsewhere)[0]


def test_the_command_runs_on_a_cpu_without_lm_eval_and_datasets():
    code = (
        "import sys\n"
        "sys.modules['datasets'] = sys.modules['lm_eval'] = None  # an import would fail\n"
        "sys.argv = ['decode', '--shape', 'tiny', '--device', 'cpu', '--context', '16', '--decode', '4', '--repeats', '1']\n"
        "from paredown.evaluation.benchmarks.decode import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for said in ("tiny as sparse24", "Tokens per second", "Memory", "Layers", "dense time / ours:", "bar 1.45x"):
        assert said in done.stdout


def test_what_cannot_be_measured_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["decode", "--shape", "tiny", "--device", "cpu", "--kept", "0.7"])
    with pytest.raises(SystemExit, match=r"^error: --kept 0.7: 2:4 keeps half"):
        decode.main()
