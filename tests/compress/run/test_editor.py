"""A block has its own layers again after it was edited, whatever happens in between."""

import pytest

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.job import resolve_job
from paredown.compress.progress import Progress
from paredown.compress.recipe import Recipe
from paredown.compress.run.pipeline import Run

RECIPE = {"method": "svd_llm", "options": {"kept": 0.6}, "reconstruct": {"steps": 2}}


class Stopped(BaseException):
    """As a signal is."""


@pytest.fixture
def compressed(windows, tmp_path):
    """`compressed(source, step)`: the bytes that a run writes; it is stopped when it begins the step, if one is named."""

    def run(source, step=None):
        def doing(text):
            if step is not None and text.startswith(step):
                raise Stopped

        with CheckpointWriter(tmp_path / "out") as writer:
            result = Run(
                resolve_job(source, Recipe.parse(RECIPE)), windows, [windows], writer, Progress(doing=doing)
            ).run()
            assert len(result.layers) == 14
            writer.finish({})
            return (writer.folder / "model.safetensors").read_bytes()

    return run


@pytest.mark.parametrize(
    "step",
    [
        "compressing model.layers.1.mlp.down_proj",
        "tuning model.layers.0, step 2",
        "running model.layers.1 as compressed",
    ],
)
def test_a_walk_that_is_stopped_gives_the_model_its_own_layers_back(step, tiny_model, compressed):
    source = ModelSource(tiny_model, "tiny")
    before = dict(source.model.named_modules())
    with pytest.raises(Stopped):
        compressed(source, step)
    assert dict(source.model.named_modules()) == before  # modules are equal if they are the same object
    assert all(p.is_meta for p in source.model.parameters())
    assert compressed(source) == compressed(ModelSource(tiny_model, "tiny"))
