"""The small mixture of experts that methods are compared on: an ordinary checkpoint, trained as planned."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paredown.compress.errors import PareError
from paredown.compress.text.stdlib_text import Document
from paredown.evaluation.benchmarks.small_moe import Plan, losses, run
from paredown.evaluation.reference import model_path

SMALL = {"steps": 3, "context": 32, "hidden": 32, "blocks": 1, "experts": 4, "width": 8}


def documents(split):
    return [Document(f"words.{split}", "the cat sat on the mat and then it ran under the house. " * 40)]


def test_what_is_written_is_an_ordinary_checkpoint_with_the_bundled_tokenizer(tmp_path):
    facts = run(Plan(tmp_path / "moe", **SMALL), documents)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model_type"] == "qwen3_moe"
    assert model.config.num_experts == 4 and model.dtype == torch.bfloat16 and model.config.use_cache
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["tokens_seen"] == 3 * 2 * 32 and 0 < facts["loss"] < 9
    bundled, own = (AutoTokenizer.from_pretrained(folder) for folder in (model_path(), tmp_path / "moe"))
    assert own("def f(x):").input_ids == bundled("def f(x):").input_ids
    nll, balance = losses(model.float(), torch.randint(4096, (2, 32)))
    assert nll.isfinite() and balance >= 0


def test_a_folder_that_is_taken_is_refused(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(PareError, match="Name another folder"):
        run(Plan(tmp_path, **SMALL), documents)
