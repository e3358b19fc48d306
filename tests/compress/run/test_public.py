"""What `paredown.compress` offers to Python: its functions, a model that is loaded already, its version and its logger."""

import logging
import re
import subprocess
import sys
import tempfile

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

import paredown.compress
from paredown.compress import PareError, bench, compress, evaluate, export, load, plan, verify
from paredown.evaluation.schema import check_report
from paredown.evaluation.speed import Settings

SMALL = ("calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=4")
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama tied": t.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "mixtral": t.MixtralConfig(**SIZES, num_local_experts=4),
}


@pytest.fixture
def run(text_file, tmp_path, verified_here):
    """`run(model, ...)`: `compress` on little text into OUT; its report."""

    def go(model, recipe="sparsegpt-2of4", out="out", **options):
        text = {"calibration": str(text_file), "eval_text": [str(text_file)]}
        return compress(model, recipe, tmp_path / out, overrides=SMALL, **text, **options)

    return go


def test_every_public_name_is_there_and_a_wrong_one_is_named():
    for name in paredown.compress.__all__:
        assert getattr(paredown.compress, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        paredown.compress.compres  # noqa: B018
    assert paredown.compress.__version__ == "unknown" or re.match(r"\d+\.\d+", paredown.compress.__version__)


def test_the_functions_do_what_the_commands_do(run, tiny_model, text_file, tmp_path):
    planned, report = plan(tiny_model, "sparsegpt-2of4"), run(tiny_model)
    check_report(report)
    assert (planned.kept_parameters, planned.bytes_after) == (report["parameters"]["kept"], report["bytes"]["after"])
    assert verify(tmp_path / "out") == []
    steps = []
    scored = evaluate(
        tmp_path / "out", tiny_model, eval_text=[str(text_file)], length=32, windows=4,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert steps == [(1, 2), (2, 2)] * 2 and scored["model"] == str(tmp_path / "out")
    for side in ("before", "after"):
        wanted = report["evaluation"][0][side]["token_perplexity"]
        assert scored["evaluation"][0][side]["token_perplexity"] == pytest.approx(wanted, rel=2e-3)
    sizes = export(tmp_path / "out", tmp_path / "dense")
    assert sizes["format"] == "dense" and sizes["bytes"]["before"] == report["bytes"]["after"] < sizes["bytes"]["after"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        packed, dense = (load(tmp_path / name).eval()(ids).logits for name in ("out", "dense"))
    assert torch.equal(packed, dense)
    timed = bench(tmp_path / "out", settings=Settings((1,), 16, 4, 1), device="cpu", out=tmp_path / "speed")
    assert timed["model"] == str(tmp_path / "out") and (tmp_path / "speed" / "bench.json").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_model_is_compressed_to_the_bytes_of_its_folder(family, run, save_model, tmp_path, monkeypatch):
    save_model(tmp_path / "model", FAMILIES[family])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    model = t.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "model")
    report, whole = run(model, out="loaded", tokenizer=tokenizer), run(tmp_path / "model", out="read")
    loaded, read = (load_file(tmp_path / name / "model.safetensors") for name in ("loaded", "read"))
    assert list(loaded) == list(read) and all(torch.equal(loaded[name], read[name]) for name in read)
    assert report["evaluation"] == whole["evaluation"] and report["model"]["id"] == str(tmp_path / "model")
    assert not [path for path in (tmp_path / "temporary").iterdir() if path.name.startswith("paredown-")]
    assert verify(tmp_path / "loaded") == []


def test_what_is_no_model_and_a_model_without_its_tokenizer_are_refused(run, tiny_model, tmp_path):
    with pytest.raises(
        PareError, match=r"model is an nn.Module \(Linear\); wanted a folder, a hub id, or a transformers"
    ):
        run(torch.nn.Linear(4, 4))
    with pytest.raises(PareError, match=r"model is a dict; wanted a folder"):
        run({})
    with pytest.raises(PareError, match="needs its tokenizer too"):
        run(t.AutoModelForCausalLM.from_pretrained(tiny_model))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_notes_go_to_the_logger(run, tiny_model, caplog):
    assert paredown.compress.logger.name == "paredown"
    with caplog.at_level(logging.INFO, "paredown"):
        run(tiny_model, "wanda-2of4")
    records = [record for record in caplog.records if record.name == "paredown"]
    assert any(record.getMessage().startswith("reading text") for record in records)
    assert {record.levelno for record in records} == {logging.INFO}


@pytest.mark.slow
def test_nothing_goes_to_the_screen(tiny_model, text_file, tmp_path):
    code = f"""
from paredown.compress import compress
text = {str(text_file)!r}
compress({str(tiny_model)!r}, "wanda-2of4", {str(tmp_path / "quiet")!r}, overrides={SMALL}, calibration=text, eval_text=[text])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
