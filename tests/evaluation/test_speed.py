"""What is told of a model's speed follows from what was timed."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import transformers as t

from paredown.compress.errors import PareError
from paredown.evaluation import decoding, gauges
from paredown.evaluation.gauges import weight_bytes
from paredown.evaluation.speed import Settings, measure

SMALL = Settings(batches=(2,), context=16, decode=8, repeats=1)


class LateDecoding(t.LlamaForCausalLM):
    """Computes a token that is decoded as if it stood one place earlier."""

    def forward(self, input_ids, position_ids=None, **options):
        earlier = None if position_ids is None else position_ids - 1
        return super().forward(input_ids, position_ids=earlier, **options)


def test_decoding_at_a_wrong_place_shows_in_the_error(llama, tiny_config):
    assert max(measured_error(llama).values()) < 1e-5
    late = LateDecoding(tiny_config).eval()
    late.load_state_dict(llama.state_dict())
    found = measure({"model": late}, SMALL)
    assert max(found["end_to_end"][0]["model"]["relative_error"].values()) > decoding.TOLERANCE
    assert "away from those of a plain forward" in found["notes"][0]


def measured_error(model):
    return measure({"model": model}, SMALL)["end_to_end"][0]["model"]["relative_error"]


def test_logits_that_are_not_finite_are_refused(llama):
    llama.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(PareError, match="NaN or infinite"):
        measure({"model": llama}, SMALL)


def test_models_take_turns_within_every_repeat(llama, random_model, tiny_config):
    order = []
    models = {"model": llama, "against": random_model(tiny_config)}
    for name, model in models.items():

        def tell(module, args, name=name):
            if 1 < args[0].shape[1] <= SMALL.context:  # a prefill: neither a step nor a plain forward
                order.append("a" if name == "model" else "b")

        model.register_forward_pre_hook(tell)
    measure(models, replace(SMALL, repeats=4))
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


def test_bytes_are_those_of_the_tensors_and_tied_weights_count_once(packed, dense, llama, random_model, tiny_config):
    tied = random_model(t.LlamaConfig(**{**tiny_config.to_dict(), "tie_word_embeddings": True}))
    assert weight_bytes(llama) - weight_bytes(tied) == 320 * 64 * 4
    assert weight_bytes(packed) < weight_bytes(dense)
    found = measure({"model": packed}, SMALL)["memory"]["model"]
    assert found["weights_bytes"] == weight_bytes(packed)
    keys_and_values = 2 * 2 * 2 * (64 // 4) * (16 + 8) * 2  # layers, both, heads, head width, tokens, bfloat16
    assert 0 <= found["cache_bytes_per_sequence"] - keys_and_values <= 64  # and a counter in each layer


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


def test_a_batch_that_does_not_fit_is_left_out_with_a_note(llama):
    need = 2 * (decoding.cache_bytes(llama, 24) + gauges.activation_bytes(llama, 16))
    found = measure({"model": llama}, replace(SMALL, batches=(4, 2)), free=need)
    assert [row["batch"] for row in found["end_to_end"]] == [2]
    assert any("batch 4 with 16 tokens of context is left out" in note for note in found["notes"])
    with pytest.raises(PareError, match="not even batch 2"):
        measure({"model": llama}, SMALL, free=need - 1)


def test_progress_is_told_to_its_end(llama):
    told = []
    measure({"model": llama}, replace(SMALL, repeats=2), lambda done, total: told.append((done, total)))
    total = told[0][1]
    assert told == [(i, total) for i in range(total + 1)]


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
