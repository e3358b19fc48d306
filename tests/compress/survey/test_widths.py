"""Direct curves against a loop over tokens, and widths that spend them, on tiny models."""

from itertools import pairwise

import pytest
import torch
import transformers

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.methods import build
from paredown.compress.methods.base import Group, Units
from paredown.compress.model.blocks import blocks
from paredown.compress.model.groups import units_of
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import InputStats, Need, Stats
from paredown.compress.recipe import Recipe
from paredown.compress.shape_job import block_numbers, resolve, unit_numbers
from paredown.compress.survey import direct
from paredown.compress.survey import widths as module
from paredown.compress.survey.gradients import backward, moments
from paredown.compress.survey.widths import SHARES, asked, chosen_widths, unit_curves, widths

CONFIG = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    """Three blocks, the last of which gives ten times as much as the first."""
    folder = tmp_path_factory.mktemp("widths") / "model"
    made = save_model(folder, transformers.LlamaConfig(**CONFIG), torch.float32)
    for layer, scale in zip(made.model.layers, (1.0, 3.0, 10.0), strict=True):
        layer.mlp.down_proj.weight.data *= scale
    made.save_pretrained(folder)
    return folder


def job_of(folder, method="paredown_width", **options):
    options = {"kept": 0.8, "multiple": 4, **options}
    return resolve(ModelSource(folder, "m"), Recipe.parse({"method": method, "options": options}))


@pytest.fixture(scope="module")
def measured(model, windows, tmp_path_factory):
    """The job and its curves."""
    job = job_of(model, widths="direct")
    return job, unit_curves(job, windows.ids, tmp_path_factory.mktemp("scratch"))


def observed(job, ids, scratch):
    """By group: inputs and gradients of its reader (tokens, ...) float64, and the group as the method reads it."""
    held, found = {}, {}

    def pair(view, x, gradient):
        held.setdefault(view.name, []).append((x.double(), gradient.double()))

    readers = {group.reader for group in job.all_groups}
    needs = job.collected, job.gradients
    for block, stats in backward(job.source, start(job.source, ids), readers, *needs, scratch, pair=pair):
        for group in job.groups[block.index]:
            x, g = (torch.cat(parts) for parts in zip(*held[group.reader], strict=True))
            units = units_of(group, block, stats[group.reader])
            found[group.name] = x, g, Units(group, units.weight.clone(), {}, units.stats)
    return found


def slow_loss(weight, cut, x, g):
    """E[(g . (W a - W_S' a_S))^2] / 2, a token after another."""
    stay, total = cut.keep.nonzero()[:, 0].tolist(), 0.0
    left = cut.weight.double() if cut.weight is not None else weight[:, stay].double()
    for a, gradient in zip(x, g, strict=True):
        error = weight.double() @ a - left @ a[stay]
        total += float(gradient @ error) ** 2
    return total / len(x) / 2


def test_a_curve_is_what_a_loop_over_tokens_gives(measured, windows, tmp_path):
    job, curves = measured
    for name, (x, g, units) in observed(job, windows.ids, tmp_path).items():
        points = dict(curves[name].points)
        assert list(points) == [0, *(round(share * 64) for share in SHARES), 64] and points[64] == 0
        nothing = float((g * (x @ units.weight.double().T)).sum(1).square().mean()) / 2
        assert points[0] == pytest.approx(nothing, rel=1e-4)
        for count in (8, 32, 60):
            wanted = slow_loss(units.weight, job.method.compress(units, count), x, g)
            assert points[count] == pytest.approx(wanted, rel=1e-3)


def test_one_order_serves_all_counts(measured, windows, tmp_path):
    method = measured[0].method
    _, _, units = next(iter(observed(measured[0], windows.ids, tmp_path).values()))
    for count, cut in zip((5, 8, 40, 63, 64), method.curve(units, (5, 8, 40, 63, 64)), strict=True):
        alone = method.compress(units, count)
        assert torch.equal(cut.keep, alone.keep) and torch.equal(cut.weight, alone.weight)


def test_the_curve_of_another_method_is_that_of_its_own_cuts(model, windows, tmp_path):
    job = job_of(model, "minitron")
    curves = unit_curves(job, windows.ids, tmp_path)
    for name, (x, g, units) in observed(job, windows.ids, tmp_path).items():
        wanted = slow_loss(units.weight, job.method.compress(units, 16), x, g)
        assert dict(curves[name].points)[16] == pytest.approx(wanted, rel=1e-3)


def test_a_bias_that_makes_up_for_a_mean_counts(model, windows, tmp_path):
    job = job_of(model, "flap")
    curves = unit_curves(job, windows.ids, tmp_path)
    name, (x, g, units) = next(iter(observed(job, windows.ids, tmp_path).items()))
    cut = job.method.compress(units, 32)
    error = x @ units.weight.double().T - x[:, cut.keep] @ units.weight[:, cut.keep].double().T - cut.shift
    assert dict(curves[name].points)[32] == pytest.approx(float((g * error).sum(1).square().mean()) / 2, rel=1e-3)


def test_a_token_whose_input_is_huge_and_whose_gradient_is_small_does_not_own_the_curve():
    """As an attention sink: with moments of inputs and gradients apart it is priced thousands of times too high."""
    draw = torch.Generator().manual_seed(0)
    x, g = torch.randn(512, 24, generator=draw), torch.randn(512, 8, generator=draw)
    x[0] *= 1e4
    g[0] *= 1e-4
    weight = torch.randn(8, 24, generator=draw)
    group = Group("mlp", "channels", 24, (), "mlp.down_proj", "intermediate_size")
    inputs = InputStats(24, frozenset({Need.GRAM}))
    inputs.update(x)
    method = build("paredown_width", {"units": 12, "refit": False})
    gradients = {need: total / 512 for need, total in moments(method.needs, weight, x, g, 1)}
    cut = method.compress(Units(group, weight, {}, Stats(inputs, gradients)), 12)
    left = torch.zeros_like(weight)
    left[:, cut.keep] = weight[:, cut.keep]
    loss, ordinary = (
        next(direct.rises(lambda a: a @ weight.T, [lambda a: a @ left.T], [(x[i:], g[i:])])) for i in (0, 1)
    )
    error = (weight - left).double()
    apart = float(((g.T @ g).double() / 512 @ error @ inputs.gram @ error.T).trace()) / 2
    assert loss == pytest.approx(ordinary, rel=0.05) and apart > 1000 * loss


def test_where_tokens_are_many_some_are_drawn_and_the_curve_is_about_the_same(
    measured, model, windows, tmp_path, monkeypatch
):
    _, curves = measured
    monkeypatch.setattr(direct, "MOST_TOKENS", windows.ids.numel() // 2)
    for name, curve in unit_curves(job_of(model), windows.ids, tmp_path).items():
        half, whole = dict(curve.points), dict(curves[name].points)
        assert half[0] != whole[0] and half[0] == pytest.approx(whole[0], rel=0.6)


@pytest.mark.parametrize("options", [{"kept": 0.8}, {"kept": 0.6}, {"kept": None, "units": 40}])
def test_the_widths_keep_what_is_asked_for_exactly_up_to_a_multiple(options, model, windows, tmp_path):
    job = job_of(model, widths="direct", **options)
    chosen = widths(job, windows.ids, tmp_path)
    assert list(chosen) == [group.name for group in job.all_groups] and len(set(chosen.values())) > 1
    unit = unit_numbers(job.source, job.all_groups[0])
    gone = sum(64 - count for count in chosen.values()) * unit
    numbers = sum(map(block_numbers, blocks(job.source)))
    wanted = (1 - options["kept"]) * numbers if options["kept"] else 3 * 24 * unit
    assert 0 <= gone - wanted + 1 < 4 * unit and all(count % 4 == 0 for count in chosen.values())
    assert chosen["model.layers.0.mlp"] < chosen["model.layers.2.mlp"]


def test_the_way_back_to_equal_widths_is_gone_as_far_as_asked(measured, model, windows, tmp_path):
    job, curves = measured
    spread = []
    for shrink in (0.0, 0.5, 1.0):
        counts = chosen_widths(curves, asked(job), 4, shrink).values()
        spread.append(max(counts) - min(counts))
    assert spread[0] > spread[1] > spread[2] and spread[2] <= 4
    own = chosen_widths(curves, asked(job), 4, 0.0)
    assert widths(job_of(model, widths="direct", shrink=0.0), windows.ids, tmp_path) == own


def test_the_moments_of_gradients_are_told_of_on_the_way(model, windows, tmp_path):
    job, told = job_of(model, widths="direct"), {}
    widths(job, windows.ids, tmp_path, seen=lambda block, stats: told.update(stats))
    assert all(job.gradients <= told[group.reader].gradients.keys() for group in job.all_groups)


def test_flap_takes_the_widths_of_its_own_scores_and_no_gradient(model, windows, tmp_path, monkeypatch):
    job = job_of(model, "flap", widths="flap", multiple=1)
    monkeypatch.setattr(module, "backward", None)
    chosen = widths(job, windows.ids, tmp_path)
    assert job.method.uneven and len(set(chosen.values())) > 1
    unit = unit_numbers(job.source, job.all_groups[0])
    assert 0 <= asked(job) - sum(chosen.values()) * unit + 1 < unit


def test_units_that_become_one_have_no_curve(model, windows, tmp_path):
    with pytest.raises(PareError, match="such a change has no curve"):
        unit_curves(job_of(model, "fold"), windows.ids, tmp_path)


def test_a_curve_falls_as_units_are_added(measured):
    for curve in measured[1].values():
        assert all(after[1] < before[1] for before, after in pairwise(curve.points))
