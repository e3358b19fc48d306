"""vLLM gives the log probabilities that transformers gives, for every kind of packed weight. See make_env.sh."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers as t
from packing import pack_folder
from safetensors.torch import load_file, save_file

vllm = pytest.importorskip("vllm", reason="vLLM is not installed: make test-serving", exc_type=ImportError)

from paredown.compress import export, load  # noqa: E402
from paredown.compress.checkpoint.transformers_plugin import packed_config  # noqa: E402
from paredown.compress.serving import vllm_plugin  # noqa: E402
from paredown.compress.storage.kinds import KINDS  # noqa: E402
from paredown.compress.storage.shapes import Shapes  # noqa: E402
from paredown.evaluation.benchmarks.gpu import figures  # noqa: E402

COMMON = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.08}
SIZES = {
    "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, **COMMON,
}  # fmt: skip
FAMILIES = {
    "phi3": t.Phi3Config(**SIZES),  # qkv and gate_up are joined in the checkpoint
    "qwen2": t.Qwen2Config(**SIZES),  # with biases
    "falcon": t.FalconConfig(  # its loader sorts rows by head
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True,
        alibi=False, bias=False, **COMMON,
    ),
    "gpt2": t.GPT2Config(n_embd=128, n_layer=2, n_head=4, n_positions=256, **COMMON),
}  # fmt: skip
IDS = torch.randint(3, 512, (3, 32), generator=torch.Generator().manual_seed(0))


def model_of(config):
    torch.manual_seed(1)
    model = t.AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model


def engine(folder, **options):
    vllm_plugin.register()
    defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4}
    return vllm.LLM(model=str(folder), skip_tokenizer_init=True, **{**defaults, **options})


def check(folder, model=None, **options):
    """Log probabilities of the prompts' tokens, and a few greedy tokens after them, are those of transformers."""
    model = load(folder).eval() if model is None else model
    with torch.inference_mode():
        logprobs = model(IDS).logits.log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
        tokens = model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 32:]
    settings = vllm.SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = engine(folder, **options).generate([{"prompt_token_ids": ids} for ids in IDS.tolist()], settings)
    found = [
        [o.prompt_logprobs[i][ids[i]].logprob for i in range(1, 32)]
        for o, ids in zip(outputs, IDS.tolist(), strict=True)
    ]
    torch.testing.assert_close(torch.tensor(found), logprobs, atol=2e-5, rtol=0)
    assert [list(o.outputs[0].token_ids) for o in outputs] == tokens.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_served_exactly(kind, tmp_path):
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", kind)
    check(tmp_path / "packed")


@pytest.mark.parametrize("kind", KINDS)
def test_kept_packed_as_on_a_gpu_every_kind_is_served_exactly(kind, tmp_path, monkeypatch):
    from paredown.compress.serving import vllm_config

    monkeypatch.setattr(vllm_config, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", kind)
    check(tmp_path / "packed")


@pytest.mark.parametrize("where", ["k_proj", "gate_proj"])
def test_a_layer_may_hold_packed_and_dense_weights(where, tmp_path):
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", "lowrank", where)
    check(tmp_path / "packed")


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gpt2"])
def test_loaders_that_join_and_sort_rows_are_followed(name, tmp_path):
    pack_folder(model_of(FAMILIES[name]), tmp_path / "packed", "lowrank")
    check(tmp_path / "packed")


@pytest.mark.parametrize("options", [{"tensor_parallel_size": 2}, {"enforce_eager": False}])
@pytest.mark.parametrize("kind", ["lowrank", "pifa"])
def test_two_processes_and_a_compiled_graph_give_the_same(kind, options, tmp_path):
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", kind)
    check(tmp_path / "packed", **options)


def test_processes_that_vllm_starts_need_no_entry_point(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", "lowrank")
    check(tmp_path / "packed", tensor_parallel_size=2)


def uneven(folder, absent):
    """MLPs of their own widths, and blocks without attention or MLP."""
    config = t.LlamaConfig(**SIZES)
    state, sizes = dict(model_of(config).state_dict()), {}
    for block, width in enumerate((320, 192, 128)):
        for name in ("gate_proj", "up_proj", "down_proj"):
            full = f"model.layers.{block}.mlp.{name}.weight"
            state[full] = state[full][:, :width] if name == "down_proj" else state[full][:width]
            sizes[full] = tuple(state[full].shape)
    gone = tuple(f"{name}." for name in absent)
    state = {name: w.contiguous() for name, w in state.items() if not name.startswith(gone)}
    settings = packed_config(config, {}, [], Shapes({n: s for n, s in sizes.items() if n in state}, absent))
    settings.dtype = torch.float32
    settings.save_pretrained(folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def test_blocks_of_their_own_sizes_are_served_exactly(tmp_path):
    (tmp_path / "packed").mkdir()
    uneven(tmp_path / "packed", ("model.layers.1.self_attn", "model.layers.2.mlp"))
    check(tmp_path / "packed")


def test_the_deci_layout_is_served_exactly(tmp_path):
    (tmp_path / "packed").mkdir()
    uneven(tmp_path / "packed", ("model.layers.1.self_attn", "model.layers.2.mlp"))
    export(tmp_path / "packed", tmp_path / "deci", "deci")
    check(tmp_path / "deci", load(tmp_path / "packed").eval(), trust_remote_code=True)


@pytest.mark.parametrize("change", ["missing", "damaged"])
def test_a_checkpoint_that_is_not_whole_is_refused(change, tmp_path):
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", "bitmap")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.bitmap"
    tensors[name] ^= 1
    if change == "missing":
        del tensors[name]
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(Exception, match="paredown verify"):
        engine(tmp_path / "packed")


def test_the_benchmark_finds_packed_and_dense_the_same(tmp_path):
    pack_folder(model_of(t.LlamaConfig(**SIZES)), tmp_path / "packed", "lowrank")
    options = ["--batch", "1", "2", "--prompt", "16", "--tokens", "4", "--repeats", "1", "--dtype", "float32"]
    command = [sys.executable, "-m", "paredown.evaluation.benchmarks.serving", str(tmp_path / "packed"), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = figures.serving(done.stdout)
    assert [row[0] for row in found.tables[0].rows] == ["1", "2"]
    assert found.numbers[-1]["largest_difference"] < 2e-5 and found.numbers[-1]["agreed"] == 1
    sizes = {one["form"]: one["weight_bytes"] for one in found.numbers if "weight_bytes" in one}
    assert sizes["packed"] != sizes["dense"]
