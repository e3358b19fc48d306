"""DSnoT against a slow loop over rows and candidates, written from its equations and the authors' stopping rules."""

import pytest
import torch

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.job import resolve_job
from paredown.compress.methods import build
from paredown.compress.methods.pruning.dsnot import WINDOW
from paredown.compress.numerics.masks import NofM
from paredown.compress.numerics.moments import INPUT_NEEDS, InputStats, Stats
from paredown.compress.recipe import Recipe


def problem(out=24, inner=32, seed=0, tokens=200):
    """A weight (out, in) and statistics of inputs whose means differ from zero, one of them dead and one constant."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=draw) * torch.rand(inner, generator=draw)
    x += torch.randn(inner, generator=draw) * 0.3
    x[:, 3], x[:, 7] = 0.0, 0.25
    inputs = InputStats(inner, INPUT_NEEDS)
    inputs.update(x)
    return torch.randn(out, inner, generator=draw), Stats(inputs), x.double()


def slow(weight, keep, x, sparsity, threshold, cycles):
    mean, variance, norm = x.mean(0), x.var(0, unbiased=False).clamp_min(1e-30), x.square().mean(0).sqrt()
    keep = keep.clone()
    for row, stays in zip(weight.double(), keep, strict=True):
        share = row * mean
        removed, kept = set((~stays).nonzero().flatten().tolist()), set(stays.nonzero().flatten().tolist())
        error = float(share[~stays].sum())
        for _ in range(cycles):
            sign = 1 if error > 0 else -1
            back = [j for j in removed if sign * share[j] > 0]
            if abs(error) <= threshold or not back:
                break
            i = max(back, key=lambda j: sign * share[j] / variance[j])
            if isinstance(sparsity, NofM):
                group = [j for j in kept if j // sparsity.m == i // sparsity.m]
                if not group:
                    removed.discard(i)
                    continue
                j = min(group, key=lambda k: abs(row[k]) * norm[k])
                if (error + share[j] - share[i]) * error <= 0:
                    break
            else:
                gone = [k for k in kept if sign * share[k] < 0]
                if not gone:
                    break
                j = min(gone, key=lambda k: abs(row[k]) * norm[k])
            error += float(share[j] - share[i])
            removed.discard(i)
            kept.discard(j)
            stays[i], stays[j] = True, False
    return keep


@pytest.mark.parametrize("initial", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize(("sparsity", "pattern"), [("2:4", NofM(2, 4)), ("1:4", NofM(1, 4)), (0.5, 0.5), (0.7, 0.7)])
@pytest.mark.parametrize("cycles", [3, 50])
def test_the_mask_is_that_of_the_slow_loop(sparsity, pattern, initial, cycles):
    weight, stats, x = problem()
    before = build("masked", {"mask": initial, "update": "none", "sparsity": sparsity}).compress(weight, stats)
    edit = build("dsnot", {"sparsity": sparsity, "initial": initial, "cycles": cycles}).compress(weight, stats)
    wanted = slow(weight, before.keep, x, pattern, 0.1 / WINDOW, cycles)
    assert torch.equal(edit.keep, wanted) and not torch.equal(edit.keep, before.keep)
    assert torch.equal(edit.keep.sum(1), before.keep.sum(1))
    assert torch.equal(edit.weight, torch.where(wanted, weight, 0.0))


@pytest.mark.parametrize("sparsity", ["2:4", 0.5])
def test_the_expected_output_of_rows_comes_nearer_to_that_of_the_dense_ones(sparsity):
    weight, stats, x = problem(64, 64)
    mean = x.mean(0)

    def missed(update):
        edit = build("masked", {"sparsity": sparsity, "update": update}).compress(weight, stats)
        return ((weight - edit.weight).double() @ mean).abs()

    before, after = missed("none"), missed("dsnot")
    assert after.mean() < 0.6 * before.mean()


def test_a_threshold_above_every_error_leaves_the_mask():
    weight, stats, _ = problem()
    wanda = build("wanda", {"sparsity": "2:4"}).compress(weight, stats)
    moved = build("dsnot", {"sparsity": "2:4", "threshold": 1e9}).compress(weight, stats)
    assert torch.equal(moved.keep, wanda.keep)


def test_mlps_keep_the_initial_mask_as_in_the_authors_code_unless_told_otherwise():
    weight, stats, _ = problem()
    wanda, moved = (build(name, {"sparsity": 0.5}).compress(weight, stats).keep for name in ("wanda", "dsnot"))

    def kept(layer, **options):
        return build("dsnot", {"sparsity": 0.5, **options}).for_layer(layer).compress(weight, stats).keep

    assert torch.equal(kept("model.layers.0.mlp.up_proj"), wanda) and torch.equal(
        kept("model.decoder.layers.1.fc1"), wanda
    )
    assert torch.equal(kept("model.layers.0.self_attn.q_proj"), moved) and not torch.equal(moved, wanda)
    assert torch.equal(kept("model.layers.0.mlp.up_proj", still=[]), moved)


def test_a_run_asks_the_method_how_it_treats_each_layer(tiny_model):
    job = resolve_job(ModelSource(tiny_model, "m"), Recipe.parse({"method": "dsnot"}))
    cycles = {view.name.rpartition(".")[2]: job.method_of(view).cycles for view in job.targets}
    assert cycles["q_proj"] == cycles["o_proj"] == 50 and cycles["gate_proj"] == cycles["down_proj"] == 0


def test_the_damping_of_its_initial_mask_is_reported():
    weight, stats, _ = problem()
    assert build("dsnot", {"initial": "sparsegpt", "damping": 0.02}).compress(weight, stats).damping == 0.02
    assert build("dsnot", {}).compress(weight, stats).damping is None
