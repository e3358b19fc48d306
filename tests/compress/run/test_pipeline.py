"""The loop against the same thing done slowly: whole model in memory, hooks, one block after the other."""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file

from paredown.compress.methods import WeightMethod, build, register
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.masks import NofM, Sparsity, keep_mask, masked
from paredown.compress.numerics.moments import InputStats, Need, Stats


def pruned_slowly(model, ids, method):
    """Each block's inputs come from the model as compressed so far."""
    for layer in model.model.layers:
        linears = [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]
        stats = {m: InputStats(m.in_features, method.needs) for m in linears}
        hooks = [m.register_forward_hook(lambda m, args, made, stats=stats: stats[m].update(args[0])) for m in linears]
        with torch.no_grad():
            model(ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            for m in linears:
                m.weight.copy_(method.compress(m.weight, Stats(stats[m])).dense())
    return model


@pytest.mark.parametrize(
    ("method", "sparsity"), [("magnitude", "2:4"), ("wanda", "2:4"), ("wanda", 0.5), ("sparsegpt", "2:4"), ("sparsegpt", 0.5)]
)  # fmt: skip
def test_the_streamed_compression_is_the_slow_one_bit_for_bit(
    method, sparsity, tmp_path, save_model, tiny_config, windows, prune
):
    model = save_model(tmp_path / "model", tiny_config)
    prune(tmp_path / "model", tmp_path / "out", sparsity=sparsity, method=method, format="dense")
    slow = pruned_slowly(model, windows.ids, build(method, {"sparsity": sparsity}))
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in slow.state_dict().items():
        assert torch.equal(found[name], tensor), name


def test_what_is_not_targeted_is_not_touched(tiny_model, tmp_path, prune):
    result, _ = prune(
        tiny_model, tmp_path / "out", format="dense", targets={"include": ["mlp"], "skip": ["layers.0", "lm_head"]}
    )
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert changed == {layer["name"] + ".weight" for layer in result.layers}
    for name in changed:  # what wanda keeps it keeps as it was
        assert torch.equal(after[name], torch.where(after[name] != 0, before[name], 0))


def test_sparsity_zero_changes_neither_weights_nor_losses(tiny_model, tmp_path, prune):
    result, _ = prune(tiny_model, tmp_path / "out", sparsity=0.0)
    before, after = (load_file(f / "model.safetensors") for f in (tiny_model, tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    entry = result.evaluation[0]
    assert entry["before"] == entry["after"] and entry["paired_delta"]["log_ratio"] == 0 and not result.specs


def test_progress_is_told_after_each_block(tiny_model, tmp_path, prune):
    told = []
    prune(tiny_model, tmp_path / "out", progress=told.append)
    assert [(d.index, d.total, d.name) for d in told] == [(0, 2, "model.layers.0"), (1, 2, "model.layers.1")]
    assert all(d.kept == 0.5 and 0 < d.relative_error < 1 and d.peak_memory > 0 for d in told)


def test_what_is_being_done_is_told_layer_by_layer_and_step_by_step(tiny_model, tmp_path, prune):
    told = []
    result, _ = prune(tiny_model, tmp_path / "out", doing=told.append, reconstruct={"steps": 2})
    assert told[-1] == ""
    assert [t for t in told if t.startswith("compressing")] == [
        f"compressing {layer['name']}" for layer in result.layers
    ]
    assert [t for t in told if t.startswith("tuning")] == [
        f"tuning model.layers.{block}, step {step} of 2" for block in (0, 1) for step in (1, 2)
    ]


def test_a_fault_between_blocks_leaves_nothing(tiny_model, tmp_path, prune):
    def fail(done):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        prune(tiny_model, tmp_path / "out", progress=fail)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_same_run_twice_writes_the_same_bytes(tiny_model, tmp_path, prune):
    for name in ("one", "two"):
        prune(tiny_model, tmp_path / name, method="sparsegpt")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_less_text_than_a_hessian_needs_is_told(tiny_model, tmp_path, prune, windows):
    """144 tokens; the widest layer, down_proj, has 96 inputs."""
    told = "{} calibration tokens are fewer than the 96 inputs of model.layers.0.mlp.down_proj"
    for count, method, warned in ((6, "sparsegpt", False), (3, "sparsegpt", True), (3, "wanda", False)):
        few = replace(windows, ids=windows.ids[:count])
        result, _ = prune(tiny_model, tmp_path / f"{method}-{count}", method=method, text=few)
        assert [f.startswith(told.format(count * 24)) for f in result.fallbacks] == [True] * warned


@register("tests_by_fisher")
@dataclass(frozen=True)
class ByFisher(WeightMethod):
    """Drops what costs least by second order, w^2 F / 2: LeCun et al. 1989, Optimal Brain Damage."""

    sparsity: Sparsity = 0.5
    needs = frozenset({Need.FISHER})

    def compress(self, weight, stats):
        keep = keep_mask(weight.double().square() * stats.gradient(Need.FISHER), self.sparsity)
        return Masked(masked(weight, keep), keep, self.sparsity)


def test_a_pruning_score_may_read_the_diagonal_fisher(tmp_path, save_model, tiny_config, windows, prune):
    model = save_model(tmp_path / "model", tiny_config)
    prune(tmp_path / "model", tmp_path / "out", method="tests_by_fisher", format="dense")
    fisher: dict[str, torch.Tensor] = {}
    for ids in windows.ids.split(1):  # one gradient of every window, by autograd over the whole model
        model.zero_grad()
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        for name, p in model.named_parameters():
            fisher[name] = fisher.get(name, 0) + p.grad.double().square()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, p in model.named_parameters():
        if "_proj" in name:
            keep = keep_mask(p.detach().double().square() * fisher[name], NofM(2, 4))
            same = ((found[name] != 0) == keep).double().mean()
            assert same > 0.99 and not torch.equal(keep, keep_mask(p.detach().abs(), NofM(2, 4)))
