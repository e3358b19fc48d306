"""Whole runs of recipes that are given as plain data, steps of a recovery, and tasks of a user's own."""

import json

import pytest
import yaml
from recovering import recipe_of

from paredown.compress import compress
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.progress import Progress
from paredown.compress.run.journal import Journal
from paredown.compress.run.recover_steps import Steps
from paredown.compress.run.recover_text import recovery_texts
from paredown.compress.run.recover_write import write_recovered

SMALL = ("calibration.sequences=4", "calibration.length=32", "evaluate.length=32", "evaluate.windows=4")


@pytest.fixture
def run_raw(text_file, tmp_path, verified_here):
    """`run_raw(model, raw, out)`: a recipe given as plain data, run on little text into OUT; its report."""

    def go(model, raw, out="out", **options):
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(raw))
        text = {"calibration": str(text_file), "eval_text": [str(text_file)], "allow_scored_calibration": True}
        return compress(model, str(path), tmp_path / out, overrides=SMALL, **text, **options)

    return go


@pytest.fixture
def tasks(tmp_path):
    """A folder with two tasks of multiple choice."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": f"{i} and", "choices": [f"{i}", "x", f"{i} {i}"], "answer": i % 3} for i in range(7)]
    (folder / "mc.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("one", "two"):
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: {folder / 'mc.jsonl'}}}}}\n"
            "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: answer\n"
            "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
        )
    return folder


@pytest.fixture
def trained(lively, text_file, tmp_path):
    """`trained(checkpoint, steps)`: the steps into tmp_path/NAME, without scores, report and verification; what they tell."""

    def run(checkpoint, steps, name="out", notes=None, save_every=300.0, then=lambda: None, doing=lambda text: None):
        recipe, tokenizer = recipe_of(text_file, steps), load_tokenizer(lively())
        source, teacher = ModelSource(checkpoint, "compressed"), ModelSource(lively(), "dense")
        progress = Progress(note=(notes if notes is not None else []).append, doing=doing)
        texts = recovery_texts(recipe, source, tokenizer, progress.note).steps
        with CheckpointWriter(tmp_path / name, resumable=True) as writer:
            journal = Journal(writer, "key", progress.note, save_every)
            with writer.scratch() as scratch:
                work = Steps(source, teacher, recipe, texts, journal, scratch, progress)
                numbers = work.run()
                then()
                write_recovered(writer, source, numbers, {"model": source.provenance()})
            writer.commit()
        return work.done

    return run
