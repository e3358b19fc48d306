"""What is timed computes what the model computes; what is told is what was timed."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
import transformers as t
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from paredown.compress import loading
from paredown.compress.errors import PareError
from paredown.compress.fusing import fuse
from paredown.evaluation import speed
from paredown.evaluation.speed import Decoding, EnergyMeter, Settings, linear_kinds, measure, weight_bytes
from paredown.evaluation.speed_report import bench_markdown, bench_svg, render_bench

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SSM = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
FAMILIES = {
    "llama": t.LlamaConfig(**C),
    "a window shorter than the context": t.MistralConfig(**C, sliding_window=8),
    "a window that ends while decoding": t.MistralConfig(**C, sliding_window=20),
    "a window that holds everything": t.MistralConfig(**C, sliding_window=64),
    "windows in every other layer": t.Gemma2Config(**C, head_dim=16, sliding_window=8),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "opt": t.OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64,
    ),
    "experts": t.MixtralConfig(**C, num_local_experts=4),
    "mamba": t.MambaConfig(**SSM),
    "mamba2": t.Mamba2Config(**SSM, num_heads=8, head_dim=16, n_groups=1, expand=2),
}  # fmt: skip
SMALL = Settings(batches=(2,), context=16, decode=8, repeats=1)


def random_model(config, dtype=torch.float32):
    """Weights large enough that the logits depend on every token before."""
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def llama():
    return random_model(t.LlamaConfig(**C))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def packed(tmp_path, tiny_model, prune):
    prune(tiny_model, tmp_path / "packed")
    return loading.load(tmp_path / "packed").eval()


@pytest.fixture
def dense(tiny_model):
    return loading.load(tiny_model).eval()


@pytest.fixture
def result(packed, dense):
    """As the command makes it."""
    measured = measure({"model": packed, "against": dense}, Settings((1, 3), 16, 4, 2))
    for told in measured["memory"].values():
        told["growth_bytes"] = 1_000_000
    return {
        "model": "org/small<1>", "against": "org/large & dense", "dtype": "bfloat16", "date": "2026-01-01",
        "device": {"type": "cpu", "name": "A <CPU>", "threads": 1}, "versions": {"torch": "2.0", "triton": None},
        **measured,
    }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoded_token_is_that_of_a_plain_forward(family):
    model = random_model(FAMILIES[family])
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    run = Decoding(model, ids, 16)
    wanted = model(ids, use_cache=False).logits  # (batch, token, vocabulary)
    for _ in range(2):  # the second time the cache is used again
        run.start()
        run.prefill()
        torch.testing.assert_close(run.logits[:, -1], wanted[:, 15], rtol=1e-4, atol=1e-4)
        for place in range(16, 24):
            run.step()
            torch.testing.assert_close(run.logits[:, -1], wanted[:, place], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.plain(), wanted[:, [16, 23]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.run_once(), wanted[:, [16, 23]], rtol=1e-4, atol=1e-4)


def test_a_rewound_cache_decodes_the_same_again(llama):
    run = Decoding(llama, torch.randint(3, 128, (2, 24)), 16)
    once = run.run_once()[:, 1]
    run.rewind()
    run.decode()
    assert run.rewindable and torch.equal(run.logits[:, -1], once)
    windowed = random_model(FAMILIES["a window shorter than the context"])
    assert not Decoding(windowed, torch.zeros(1, 24, dtype=torch.long), 16).rewindable


def test_decoding_at_a_wrong_place_shows_in_the_error(llama, monkeypatch):
    assert max(measured_error(llama).values()) < 1e-5
    right = Decoding.start

    def late(self):
        right(self)
        self.position.fill_(self.context - 1)

    monkeypatch.setattr(Decoding, "start", late)
    found = measure({"model": llama}, SMALL)
    assert max(found["end_to_end"][0]["model"]["relative_error"].values()) > speed.TOLERANCE
    assert "away from those of a plain forward" in found["notes"][0]


def measured_error(model):
    return measure({"model": model}, SMALL)["end_to_end"][0]["model"]["relative_error"]


class Graph:
    """Stands in for a CUDA graph."""

    def __init__(self, replay):
        self.replay = replay


def test_a_captured_step_is_used_only_if_it_computes_what_the_model_computes(llama, monkeypatch):
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))

    def attempt(make):
        runs = {"model": Decoding(llama, ids, 16)}
        monkeypatch.setattr(speed, "captured", make)
        return speed._use_graphs(runs, {"model": {"first": 1e-6, "last": 1e-6}})

    assert attempt(lambda calls: {name: Graph(call) for name, call in calls.items()}) == (True, None)
    # a graph that forgot to move on: every step is the same one
    frozen = attempt(lambda calls: {name: Graph(lambda: None) for name in calls})
    assert frozen == (False, "the captured step of model does not compute what the model computes")
    assert attempt(lambda calls: None) == (False, "a step cannot be captured into one")


def test_logits_that_are_not_finite_are_refused(llama):
    model = random_model(t.LlamaConfig(**C))
    model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(PareError, match="NaN or infinite"):
        measure({"model": model}, SMALL)


def test_models_take_turns_within_every_repeat(llama, monkeypatch):
    order = []
    prefill = Decoding.prefill

    def told(self):
        order.append("a" if self.model is llama else "b")
        prefill(self)

    other = random_model(t.LlamaConfig(**C))
    monkeypatch.setattr(Decoding, "prefill", told)
    measure({"model": llama, "against": other}, replace(SMALL, repeats=4))
    assert "".join(order) == "ab" + "ab" + "abbaabba"  # cache sizes, checks, and what is timed


def test_rates_and_ratios_follow_from_the_seconds(packed, dense):
    found = measure({"model": packed, "against": dense}, replace(SMALL, repeats=3))
    row = found["end_to_end"][0]
    assert row["decode_mode"] == "eager"
    for phase, tokens in (("prefill", 2 * 16), ("decode", 2 * 8)):
        ours, theirs = row["model"][phase], row["against"][phase]
        assert ours["seconds"]["low"] <= ours["seconds"]["median"] <= ours["seconds"]["high"]
        assert ours["tokens_per_second"]["median"] == pytest.approx(tokens / ours["seconds"]["median"])
        assert ours["tokens_per_second"]["high"] == pytest.approx(tokens / ours["seconds"]["low"])
        assert row["ratio"][phase] == pytest.approx(theirs["seconds"]["median"] / ours["seconds"]["median"])
    assert row["model"]["joules_per_token"] is None and row["model"]["peak_bytes"] is None


def test_bytes_are_those_of_the_tensors_and_tied_weights_count_once(packed, dense, tiny_model):
    tied = random_model(t.LlamaConfig(**C, tie_word_embeddings=True))
    untied = random_model(t.LlamaConfig(**C))
    assert weight_bytes(untied) - weight_bytes(tied) == 128 * 64 * 4
    assert weight_bytes(packed) < weight_bytes(dense)
    found = measure({"model": packed}, SMALL)["memory"]["model"]
    assert found["weights_bytes"] == weight_bytes(packed)
    keys_and_values = 2 * 2 * 2 * (64 // 4) * (16 + 8) * 2  # layers, both, heads, head width, tokens, bfloat16
    assert 0 <= found["cache_bytes_per_sequence"] - keys_and_values <= 64  # and a counter in each layer


def test_every_kind_of_layer_is_timed_against_its_dense_counterpart(packed, dense):
    found = measure({"model": packed, "against": dense}, SMALL)["layers"]
    kinds = {(row["kind"], row["out"], row["in"]): row["count"] for row in found}
    assert kinds == {
        ("sparse24", 64, 64): 4, ("sparse24", 32, 64): 4, ("sparse24", 96, 64): 4, ("sparse24", 64, 96): 2,
    }  # fmt: skip
    for row in found:
        assert [timing["tokens"] for timing in row["timings"]] == [1, 8, 32, 512]
        assert row["bytes"] < 2 * row["out"] * row["in"] and row["against"] == "the other model's layer"
        for timing in row["timings"]:
            quotient = timing["against_seconds"]["median"] / timing["seconds"]["median"]
            assert timing["ratio"] == pytest.approx(quotient) and timing["relative_error"] < 0.01
    alone = measure({"model": packed}, SMALL)["layers"]
    assert all(row["against"] == "torch's product with the unpacked weight" for row in alone)
    plain = measure({"model": dense}, SMALL)["layers"]
    assert all(row["against"] is None and row["timings"][0]["ratio"] is None for row in plain)


def test_the_dense_product_is_that_of_the_unpacked_weight(packed):
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    layer = packed.model.layers[0].mlp.up_proj
    assert torch.equal(speed._dense_product(layer)(x), F.linear(x, layer.weight))
    conv = t.pytorch_utils.Conv1D(5, 64)
    conv.bias.normal_()
    x = torch.randn(3, 64)
    torch.testing.assert_close(speed._dense_product(conv)(x), conv(x))


def test_layers_that_are_one_product_are_timed_as_one(packed, dense):
    """A member of a group multiplies for all of them: alone it would look slower than it is."""
    assert fuse(packed, "cpu") == 4
    units = linear_kinds(packed)
    assert {key: len(found) for key, found in units.items()} == {
        ("sparse24, 3 fused", 128, 64): 2, ("sparse24", 64, 64): 2, ("sparse24, 2 fused", 192, 64): 2,
        ("sparse24", 64, 96): 2,
    }  # fmt: skip
    assert units["sparse24, 2 fused", 192, 64][1] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    rows = measure({"model": packed, "against": dense}, SMALL)["layers"]
    fused = next(row for row in rows if row["kind"] == "sparse24, 3 fused")
    assert fused["layer"].endswith("self_attn.q_proj + k_proj + v_proj")
    assert all(timing["relative_error"] < 0.01 and timing["ratio"] for timing in fused["timings"])


def test_the_layer_of_middle_size_stands_for_its_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4, bias=i != 1) for i in range(3))
            self.head = nn.Linear(4, 9)
            self.dtype = torch.float32

    cases = list(speed._layer_cases({"model": Model()}))
    assert {case.name for case in cases} == {"blocks.0"} and cases[0].count == 3
    assert all(case.shape == (4, 4) for case in cases)  # the head stands in no block


def test_fused_experts_are_named_as_not_timed():
    model = random_model(FAMILIES["experts"])
    told = measure({"model": model}, SMALL)["notes"]
    assert any("4 fused parameters such as model.layers.0.mlp.experts" in text for text in told)


def test_sizes_are_capped_by_what_the_model_allows_and_it_is_said():
    asked = Settings((1,), context=512, decode=64)
    assert asked.within(576) == (asked, [])
    capped, told = asked.within(512)
    assert (capped.context, capped.decode) == (448, 64) and told == [
        "context is 448 tokens, not 512: the model allows 512"
    ]
    capped, told = asked.within(64)
    assert (capped.context, capped.decode) == (32, 32) and len(told) == 2
    for longest in range(5, 40):
        capped = asked.within(longest)[0]
        assert capped.context >= 1 and capped.context + capped.decode <= longest
    with pytest.raises(PareError, match="the model allows 4 tokens"):
        asked.within(4)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batches": (0,)}, "batch 0"),
        ({"batches": ()}, "no batch"),
        ({"decode": 3}, "decode 3"),
        ({"repeats": 0}, "repeats 0"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(PareError, match=said):
        Settings(**wrong)


def test_a_batch_that_does_not_fit_is_left_out_with_a_note(llama, monkeypatch):
    need = 2 * (speed.cache_bytes(llama, 24) + speed._activation_bytes(llama, 16))
    monkeypatch.setattr(speed, "free_memory", lambda device: need)
    found = measure({"model": llama}, replace(SMALL, batches=(4, 2)))
    assert [row["batch"] for row in found["end_to_end"]] == [2]
    assert any("batch 4 with 16 tokens of context is left out" in note for note in found["notes"])
    monkeypatch.setattr(speed, "free_memory", lambda device: need - 1)
    with pytest.raises(PareError, match="not even batch 2"):
        measure({"model": llama}, SMALL)


def test_progress_is_told_to_its_end(llama):
    told = []
    measure({"model": llama}, replace(SMALL, repeats=2), lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told == [(i, total) for i in range(total + 1)]


def test_energy_is_what_the_counter_rose_by_for_each_token(llama, monkeypatch):
    class Counter:
        spent = 0

        def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # millijoules
            self.spent += 48_000
            return self.spent

    monkeypatch.setattr(speed, "ENERGY_SECONDS", 1e-9)  # one pass
    run = Decoding(llama, torch.zeros(2, 24, dtype=torch.long), 16)
    assert speed._joules_per_token(run, EnergyMeter(Counter(), None), torch.device("cpu")) == 48 / (8 * 2)
    assert speed._joules_per_token(run, None, torch.device("cpu")) is None
    assert EnergyMeter.of(torch.device("cpu")) is None


def test_a_model_that_no_static_cache_fits_is_refused(llama, monkeypatch):
    def forward(*args, **options):
        raise RuntimeError("The expanded size of the tensor must match")

    monkeypatch.setattr(Decoding, "_forward", forward)
    with pytest.raises(PareError, match="LlamaForCausalLM cannot run with a static cache"):
        measure({"model": llama}, SMALL)


def test_screen_and_markdown_show_both_models_their_ratio_and_the_protocol(result):
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render_bench(result))
    for text in (shown.get(), bench_markdown(result)):
        assert "org/small<1>" in text and "org/large & dense" in text
        assert f"{result['end_to_end'][1]['ratio']['decode']:.2f}x" in text
        assert "2 repeats, the two models in turn; 16 random tokens of context" in text
        assert "sparse24" in text and "cache, batch 3" in text and "J/token" not in text


def test_energy_has_a_column_where_it_was_measured(result):
    for row in result["end_to_end"]:
        row["model"]["joules_per_token"], row["against"]["joules_per_token"] = 0.25, 0.5
    assert "| J/token, both |" in bench_markdown(result) and "| 0.5, 0.25 |" in bench_markdown(result)


def test_one_model_alone_has_no_ratio(packed, result):
    alone = {**result, **measure({"model": packed}, SMALL), "against": None}
    alone["memory"]["model"]["growth_bytes"] = 0
    told = bench_markdown(alone)
    assert "| batch | phase | org/small<1> |" in told and "in turn" not in told
    assert ET.fromstring(bench_svg(alone)) is not None


def test_bars_are_as_tall_as_the_rates_they_show(result):
    svg = ET.fromstring(bench_svg(result))
    space = "{http://www.w3.org/2000/svg}"
    for key in ("model", "against"):
        bars = [float(bar.get("height")) for bar in svg.iter(f"{space}rect") if bar.get("class") == key][1:]
        rates = [
            row[key][phase]["tokens_per_second"]["median"]
            for phase in ("prefill", "decode")
            for row in result["end_to_end"]
        ]
        for pair in (slice(0, 2), slice(2, 4)):  # each phase has its own scale
            assert bars[pair][0] / bars[pair][1] == pytest.approx(rates[pair][0] / rates[pair][1], rel=0.02)
    texts = [text.text for text in svg.iter(f"{space}text")]
    assert "org/small<1>" in texts and any(text.startswith("A <CPU>") for text in texts)
    assert all(float(bar.get("y")) >= 0 for bar in svg.iter(f"{space}rect"))


def test_the_picture_has_colours_for_light_and_dark_for_every_class_it_uses(result):
    svg = bench_svg(result)
    light, dark = svg.split("prefers-color-scheme: dark")
    used = set(re.findall(r'class="(\w+)"', svg)) - {"title"}
    assert used and all(f".{name} {{" in light and f".{name} {{" in dark for name in used)


def test_neither_lm_eval_nor_datasets_is_imported(tiny_model, tmp_path):
    code = (
        "import sys, json\n"
        "sys.modules['datasets'] = sys.modules['lm_eval'] = None  # an import would fail\n"
        f"sys.argv = ['paredown', 'bench', {str(tiny_model)!r}, '--batch', '1', '--repeats', '1', '--decode', '4', '--json']\n"
        "from paredown.commands.app import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["end_to_end"][0]["batch"] == 1
