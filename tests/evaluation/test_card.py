"""The model card: metadata for the Hub, an example that runs, and nothing of the machine."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from paredown.compress.run.export import export
from paredown.evaluation.card import carried_over, export_card, hub_dataset, model_card, named

SOURCE = """---
license: other
license_name: llama3.2
license_link: LICENSE.txt
language: [en, de]
datasets: org/web
pipeline_tag: image-text-to-text
tags: [theirs]
---
# A model
"""


def front(card):
    data = yaml.safe_load(card.split("---\n")[1])
    assert data == ModelCard(card).data.to_dict()  # as the Hub's own library reads it
    return data


def test_the_metadata_says_base_model_relation_library_tags_and_results(report):
    data = front(model_card(report))
    assert data["base_model"] == "meta-llama/Llama-3.2-1B" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "paredown"
    assert {"paredown", "wanda", "wanda-2-4"} <= set(data["tags"])
    results = ModelCard(model_card(report)).data.eval_results
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in results} == {
        ("wikitext2 (test)", "perplexity", 14.52),
        ("boolq (lm-eval)", "accuracy", 0.61),
        ("wikitext (lm-eval)", "word_perplexity", 17.25),
    }


def test_licence_language_datasets_and_task_are_carried_over_from_the_sources_card(report, tmp_path):
    (tmp_path / "README.md").write_text(SOURCE)
    report["calibration"]["source"] = "c4"
    data = front(model_card(report, carried_over(tmp_path)[0]))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "llama3.2", "LICENSE.txt")
    assert data["language"] == ["en", "de"] and data["pipeline_tag"] == "image-text-to-text"
    assert data["datasets"] == ["org/web", "allenai/c4"] and "theirs" not in data["tags"]


@pytest.mark.parametrize("text", ["---\nlicense: [\n---\n", "---\n- a list\n---\n"])
def test_a_damaged_source_card_is_told_and_nothing_is_carried_over(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    known, (warning,) = carried_over(tmp_path)
    assert known == {} and "licence is not in the new card" in warning


def test_a_source_without_card_or_metadata_is_nothing_to_tell(tmp_path):
    assert carried_over(tmp_path) == ({}, [])
    (tmp_path / "README.md").write_text("# words")
    assert carried_over(tmp_path) == ({}, [])


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("wikitext2", "Salesforce/wikitext"),
        ("org/set", "org/set"),
        ("stdlib", None),
        ("words.txt", None),
        ("/a/b", None),
    ],
)
def test_only_datasets_of_the_hub_are_named_as_such(text, name):
    assert hub_dataset(text) == name


def test_the_card_holds_the_command_the_table_the_protocol_and_the_limits(report):
    card = model_card(report)
    assert "paredown compress meta-llama/Llama-3.2-1B --recipe=wanda-2-4.yaml -o small" in card
    assert "| wikitext2 (test) | 9.761 ± 0.052 | 14.520 ± 0.081 |" in card
    for words in ("341,469 tokens", "Zeros are not bytes, and bytes are not speed until measured", "Sun et al. 2023"):
        assert words in card
    assert "sparsity 2:4" in card and "abc123" in card
    assert "- Fallbacks: 15\n" in card and "  - the [bold]window[/bold] was capped at 512\n" in card


def test_the_card_tells_nothing_of_the_machine_it_was_made_on(report, tmp_path):
    report["model"]["id"] = str(tmp_path / "my-model")
    report["calibration"]["source"] = report["evaluation"][0]["corpus"] = str(tmp_path / "notes.txt")
    report["command"] = f"paredown compress {tmp_path}/my-model --source={tmp_path}/notes.txt"
    card = model_card(report)
    assert str(tmp_path) not in card
    assert "my-model" in card and "notes.txt" in card
    assert not {"base_model", "base_model_relation"} & front(card).keys()


def test_a_dense_card_needs_no_import_and_owns_up_to_its_size(report):
    assert "import paredown.compress" in model_card(report)
    dense = copy.deepcopy(report) | {"format": "dense"}
    dense["bytes"]["after"] = dense["bytes"]["before"]
    assert "paredown.compress" not in model_card(dense) and front(model_card(dense))["library_name"] == "transformers"
    assert "as large as the original" in model_card(dense)
    assert "as large as the original" not in model_card(report)


def test_every_row_of_a_card_table_has_as_many_cells_as_its_header(report):
    report["tasks"]["a|b"] = report["tasks"]["boolq"]
    tables = [block for block in model_card(report).split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        widths = {line.replace("\\|", "").count("|") for line in table.splitlines()}
        assert len(widths) == 1


def test_a_pushed_card_loads_from_the_hub(report):
    card = named(model_card(report), "org/small")
    assert card.count('from_pretrained("org/small")') == 2 and 'from_pretrained(".")' not in card
    assert "In this folder" not in card


def code_in(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def test_the_example_of_a_packed_card_runs_as_it_stands_and_that_of_a_dense_one_without_paredown(
    tiny_model, prune, tmp_path, report, monkeypatch, capsys
):
    prune(tiny_model, tmp_path / "packed")
    (tmp_path / "packed/README.md").write_text(model_card(report))
    export(tmp_path / "packed", tmp_path / "dense")
    monkeypatch.chdir(tmp_path / "packed")
    exec(code_in(tmp_path / "packed"), {})
    assert "Once upon a time" in capsys.readouterr().out
    code = code_in(tmp_path / "dense") + "import sys; print('paredown' in sys.modules, model.dtype)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path / "dense"
    )
    assert done.stdout.startswith("Once upon a time") and done.stdout.endswith("False torch.bfloat16\n")


def test_the_card_says_which_engines_take_it_and_of_an_export_those_that_take_that(report, tmp_path):
    assert "## What runs it" not in model_card(report)
    report["engines"] = {"transformers": "after import paredown.compress", "vLLM": "with paredown installed"}
    assert "## What runs it\n\n- transformers: after import paredown.compress\n- vLLM: with" in model_card(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    size = {"before": 1_612_500_000, "after": 2_400_000_000}
    result = {"model": "small", "out": "big", "format": "gguf", "engines": {"llama.cpp": "as it is"}, "bytes": size}
    card = export_card(tmp_path, result, {})
    assert "- llama.cpp: as it is" in card and "- vLLM" not in card


def test_an_export_of_a_run_keeps_its_scores_and_says_what_they_are_of(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report))
    result = {
        "model": "small",
        "out": "big",
        "format": "dense",
        "bytes": {"before": 1_612_500_000, "after": 2_400_000_000},
    }
    card = export_card(tmp_path, result, {})
    assert "scored as packed weights, which `paredown export` then stored as dense ones" in card
    assert "14.520 ± 0.081" in card and "| checkpoint | 2.40 GB | 2.40 GB | 100.0% |" in card
    assert front(card)["base_model"] == "meta-llama/Llama-3.2-1B" and "import paredown" not in card


def test_an_export_of_another_tools_checkpoint_claims_no_scores(tiny_model, tmp_path):
    (tiny_model / "README.md").write_text(SOURCE)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight[:, ::2] = 0
    model.save_pretrained(tiny_model)
    export(tiny_model, tmp_path / "out", "packed")
    card = (tmp_path / "out/README.md").read_text()
    assert "Nothing was scored" in card and "import paredown.compress" in card
    assert front(card)["license"] == "other" and "model-index" not in front(card)
