"""What a run tells of the model that it was given, and what it takes along."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError
from paredown.compress.run import compress as run
from paredown.compress.run import once
from paredown.compress.run.result import PRUNED, Result
from paredown.compress.run.tokens import check_companions, probe_tokens, token_faults
from paredown.compress.run.verify import verify


def test_a_run_tells_of_an_adapter_and_of_zeros_and_takes_licences_along(tiny_model, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(once, "_verify", lambda folder, note: note(str(verify(folder))))  # in this process
    weights = load_file(tiny_model / "model.safetensors")
    for name, weight in weights.items():
        if "_proj" in name:
            weight[::4] = 0
    save_file(weights, tiny_model / "model.safetensors", metadata={"format": "pt"})
    (tiny_model / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tiny_model / "LICENSE").write_text("words")
    (tiny_model / "additional_chat_templates").mkdir()
    (tiny_model / "additional_chat_templates" / "rag.jinja").write_text("R{{ messages[0].content }}")
    (tiny_model / "tokenizer.pkl").write_text("x")
    told = []
    report = run.compress(
        str(tiny_model), "magnitude-50", tmp_path / "out", calibration=str(text_file), format="dense", note=told.append,
        overrides=["calibration.sequences=2", "calibration.length=32", "evaluate.perplexity=[]"],
    )  # fmt: skip
    assert "[]" in told
    told = "\n".join(report["warnings"])
    assert "25.0% of the targeted weights were zeros already" in told
    assert "adapter (LoRA)" in told and "tokenizer.pkl does not go along" in told
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    tokenizer = load_tokenizer(tmp_path / "out")
    assert (
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], chat_template="rag", tokenize=False) == "Rx"
    )
    record = json.loads((tmp_path / "out" / "paredown.json").read_text())
    assert {"LICENSE", "additional_chat_templates/rag.jinja", "config.json", "tokenizer.json"} <= set(record["files"])
    assert record["tokenizer"] == probe_tokens(tokenizer)


@pytest.mark.parametrize(("zeros", "told"), [(PRUNED, False), (PRUNED + 0.01, True)])
def test_a_few_zeros_are_no_pruned_model(zeros, told):
    result, weight = Result(), torch.ones(100, 10)
    weight.flatten()[: round(zeros * 1000)] = 0
    result.look_at(weight)
    assert bool(result.pruned_before()) == told
    again = Result()
    again.restore(result.state())
    assert again.pruned_before() == result.pruned_before()


def test_a_tokenizer_that_would_not_go_along_is_refused_before_any_work(tiny_model, tmp_path):
    tokenizer = load_tokenizer(tiny_model)
    (tiny_model / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (tiny_model / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(
        PareError, match=r"tokenizer.json does not go along: it is a link .* has no tokenizer, or another"
    ):
        check_companions(tiny_model, tokenizer)
    (tiny_model / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").rename(tiny_model / "tokenizer.json")
    (tiny_model / "tokenizer_notes.txt").symlink_to(tmp_path / "notes")
    assert check_companions(tiny_model, tokenizer) == [
        "tokenizer_notes.txt does not go along: it is a link that leads nowhere."
    ]


def test_tokens_that_a_tokenizer_adds_are_compared_too(tiny_model):
    recorded = probe_tokens(load_tokenizer(tiny_model))
    assert list(token_faults(tiny_model, recorded)) == []
    (fault,) = token_faults(tiny_model, {text: [256, *ids] for text, ids in recorded.items()})
    assert "gives other ids" in fault


@pytest.mark.parametrize("content", ["{", "[]", "7"])
def test_a_damaged_generation_config_is_refused_before_any_work(content, tiny_model):
    (tiny_model / "generation_config.json").write_text(content)
    with pytest.raises(PareError, match=r"generation_config.json cannot be read .* Mend it"):
        check_companions(tiny_model, load_tokenizer(tiny_model))


def test_what_does_not_pass_verification_is_kept_and_the_next_run_begins_anew(
    tiny_model, text_file, tmp_path, monkeypatch
):
    def go():
        return run.compress(
            str(tiny_model), "magnitude-50", tmp_path / "out", calibration=str(text_file),
            overrides=["calibration.sequences=2", "calibration.length=32", "evaluate.perplexity=[]"],
        )  # fmt: skip

    def fail(folder, note):
        raise PareError("the loss differs")

    monkeypatch.setattr(once, "_verify", fail)
    with pytest.raises(PareError, match="the loss differs"):
        go()
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial" / "paredown.json").exists()
    monkeypatch.setattr(once, "_verify", lambda folder, note: None)
    go()
    assert verify(tmp_path / "out") == [] and not (tmp_path / "out.partial").exists()
