"""D-Pruner against a loop over weights, and gradients on one text beside statistics of another."""

import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.checkpoint.writer import CheckpointWriter
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.methods import build
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import GRADIENT_NEEDS, INPUT_NEEDS, InputStats, Need, Stats
from paredown.compress.recipe import Recipe
from paredown.compress.run.pipeline import Run
from paredown.compress.run.record import write_record
from paredown.compress.run.texts import read_texts
from paredown.compress.survey.gradients import backward, moments
from paredown.compress.text.windows import Windows


def problem(out=12, inner=16):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, inner, generator=draw) @ torch.randn(inner, inner, generator=draw)
    x[:, 5] = 0
    inputs = InputStats(inner, INPUT_NEEDS)
    inputs.update(x)
    weight = torch.randn(out, inner, generator=draw)
    sums = dict(moments(GRADIENT_NEEDS, weight, x, torch.randn(300, out, generator=draw) / 100, sequences=5))
    return weight, Stats(inputs, {need: total.double() / 300 for need, total in sums.items()})


@pytest.mark.parametrize("options", [{}, {"regularization": 30.0}, {"regularization": 0.0}])
def test_the_mask_is_that_of_its_formula(options):
    weight, stats = problem()
    keep = build("d_pruner", {"sparsity": 0.5, **options}).compress(weight, stats).keep
    gram = stats.inputs.gram
    gram[5, 5] = 1.0
    # the mean over all inputs, the dead one among them, as SparseGPT has it
    gram += 0.01 * (stats.inputs.gram.diagonal().mean()) * torch.eye(16).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    g, f = stats.gradient(Need.WEIGHT_GRADIENT), stats.gradient(Need.FISHER)
    scores = {}
    for i in range(12):
        for j in range(16):
            w = float(weight[i, j])
            general = 0.0 if j == 5 else 2 * 2048 * w**2 / float(upper[j, j]) ** 2
            slope = float(g[i, j]) + 2 * options.get("regularization", 0.1) * 0.03**2 * general * float(f[i, j])
            scores[i, j] = abs(w * slope + w * w * float(f[i, j]) / 2)
    wanted = sorted(scores, key=lambda place: -scores[place])[: 12 * 16 // 2]
    assert {place for place in scores if keep[place]} == set(wanted)


def domain_of(windows):
    ids = torch.randint(3, 128, windows.ids.shape, generator=torch.Generator().manual_seed(9))
    return Windows(windows.ids, "general", "train", "0", domain=Windows(ids, "domain", "train", "1"))


def test_gradients_come_from_the_domain_and_inputs_from_the_general_text(tiny_model, tmp_path, windows):
    both = domain_of(windows)
    raw = {"method": "d_pruner", "options": {"sparsity": 0.5}, "calibration": {"source": "a", "domain": "b"}}
    job = resolve_job(ModelSource(tiny_model, "m"), Recipe.parse(raw), "dense")
    with CheckpointWriter(tmp_path / "out") as writer:
        write_record(writer, job, Run(job, both, [both, both.domain], writer).run(), both)
        writer.commit()
    source, needs = ModelSource(tiny_model, "m"), job.method.needs
    name = "model.layers.0.self_attn.q_proj"  # of the first block, which sees dense inputs
    (tmp_path / "scratch").mkdir()
    found = {}
    for ids, own in ((both.ids, {Need.WEIGHT_GRADIENT}), (both.domain.ids, needs & GRADIENT_NEEDS)):
        for block, stats in backward(
            source, start(source, ids), {name}, frozenset({Need.GRAM}), frozenset(own), tmp_path / "scratch"
        ):
            if block.index == 0:
                found[len(own)] = stats[name]
                weight = next(v for v in block.views() if v.name == name).weight.clone()
    wanted = job.method.compress(weight, Stats(found[1].inputs, found[2].gradients))
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"], wanted.weight)


def test_a_domain_is_read_recorded_and_warned_of_where_it_scores_too(tiny_model, text_file, tmp_path, tokenizer):
    general = tmp_path / "general.txt"
    general.write_text(text_file.read_text()[::-1])
    small = {"sequences": 2, "length": 16}
    recipe = Recipe.parse(
        {
            "method": "d_pruner",
            "calibration": {"source": str(general), "domain": str(text_file), "allow_scored": True, **small},
            "evaluate": {"perplexity": [str(general), str(text_file)], "length": 16, "windows": 2},
        }
    )
    windows, evaluations, warnings = read_texts(recipe, ModelSource(tiny_model, "m"), tokenizer)
    assert windows.domain is not None and not torch.equal(windows.domain.ids, windows.ids)
    assert windows.provenance()["domain"]["corpus"] == evaluations[1].corpus and len(warnings) == 2


def test_a_domain_is_refused_where_no_gradient_is_read(tiny_model):
    recipe = Recipe.parse({"method": "wanda", "calibration": {"domain": "law.txt"}})
    with pytest.raises(PareError, match=r"calibration.domain is the text of gradients, and wanda reads none"):
        resolve_job(ModelSource(tiny_model, "m"), recipe)
