"""Tuning of edited blocks: it lowers the error it says it lowers, keeps what the edit promised, and is written as it ran."""

import json
from dataclasses import dataclass

import pytest
import torch
import transformers as t
from safetensors.torch import load_file

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.stream import BATCH_TOKENS, start
from paredown.compress.numerics.edits import Masked
from paredown.compress.numerics.perplexity import perplexity, token_nll
from paredown.compress.recipe import Recipe
from paredown.compress.recovery.reconstruct import SHORTER, Reconstructed, interpolated, reconstruct
from paredown.compress.run.editor import Editor
from paredown.compress.storage.modules import PACKED
from paredown.compress.survey.collect import observe_alone, observe_both, shared_copy
from paredown.compress.survey.survey import survey
from paredown.compress.text.windows import Windows

C = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA = t.LlamaConfig(**C)
FAMILIES = {
    "qwen2": t.Qwen2Config(**C),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "opt": t.OPTConfig(
        vocab_size=128, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "gpt_neox": t.GPTNeoXConfig(**C),
    "mamba": t.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=2, state_size=8),
}
TUNE = {"steps": 8, "batch": 4}
HALF = {"method": "svd_llm", "options": {"kept": 0.5}}
PIFA = {"method": "svd_llm", "options": {"kept": 0.5, "storage": "pifa"}}
MASK = {"sparsity": "2:4"}
ROM = {"method": "rom", "options": {"kept": 0.5}}
OURS = {"method": "paredown_lowrank", "options": {"kept": 0.7}}


@dataclass
class Tuned:
    """One call of `reconstruct`, with what was before and after it."""

    prefix: str
    before: float  # errors by a slow formula
    after: float
    result: Reconstructed
    edits: dict
    edited: dict  # the block's parameters before
    weights: dict  # and after
    hidden: list  # its input in the compressed model and in the dense one, and the dense output


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, save_model):
    """`model_of(config, dtype)`: the folder of a model whose blocks do more than hand their input on; nobody changes it."""
    known = {}

    def make(config=LLAMA, dtype=torch.float32):
        key = config.to_json_string(), dtype
        if key not in known:
            known[key] = written(tmp_path_factory.mktemp("models") / "model", config, dtype)
        return known[key]

    def written(folder, config, dtype):
        model = save_model(folder, config, dtype)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "emb" not in name and "wte" not in name and "wpe" not in name:
                    parameter *= 5
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def run(tmp_path_factory, prune):
    """`run(folder, ...)`: the folder that a run with reconstruction writes, and its result; nobody changes them."""
    known = {}

    def make(folder, **recipe):
        key = str(folder), json.dumps({"format": "packed", **recipe}, sort_keys=True)
        if key not in known:
            out = tmp_path_factory.mktemp("runs") / "out"
            known[key] = out, prune(folder, out, **recipe)[0]
        return known[key]

    return make


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, windows):
    """`tuned(folder, ...)`: the blocks of a run with reconstruction, here walked step by step, and what came of each."""
    known = {}

    def make(folder, **recipe):
        key = str(folder), json.dumps({"format": "packed", **recipe}, sort_keys=True)
        if key not in known:
            known[key] = walk(folder, **recipe)
        return known[key]

    def parameters(block):
        return {name: p.detach().clone() for name, p in block.module.named_parameters()}

    @torch.no_grad()
    def walk(folder, sparsity="2:4", format="packed", method="wanda", batch_tokens=None, **changes):
        recipe = Recipe.parse({"method": method, "options": {"sparsity": sparsity}, **changes})
        job, ids, blocks = resolve_job(ModelSource(folder, "m"), recipe, format), windows.ids, []
        made = survey(job, ids, tmp_path_factory.mktemp("scratch"))
        targets = job.targets_within(made.angles)
        options = job.allocate(targets, made.choices or None, ids.numel(), made.sensitivities)
        editor = Editor(job, made, options, frozenset(view.name for view in targets))
        stream = start(job.source, ids, batch_tokens)
        dense = stream.copy()
        for block in job.blocks:
            with job.source.loaded(block), editor.editing(block) as edited:
                gradients, twin, inputs = made.gradients(block, stream.device), shared_copy(block), list(dense.hidden)
                views = [view for view in block.views() if view.name in editor.targets]
                if job.paired:
                    observed = observe_both(
                        stream, dense, block, twin, views, job.collected, "residual" in job.method.needs
                    )
                else:
                    observed = observe_alone(stream, block, views, job.collected)
                for group, stats in observed:
                    for _ in editor.edit_group(edited, group, stats, gradients):
                        pass
                if not job.paired:
                    dense.advance(twin)
                targets = dense.hidden
                hidden = [torch.cat(part) for part in (stream.hidden, inputs, targets)]
                weights, before = parameters(block), slow_error(block, stream, targets)
                spec, seed = recipe.reconstruct, recipe.calibration.seed
                result = reconstruct(block, stream, inputs, targets, edited.edits, spec, seed)
                after = slow_error(block, stream, targets)
                edits = dict(edited.edits)
                blocks.append(Tuned(block.prefix, before, after, result, edits, weights, parameters(block), hidden))
                stream.advance(block)
        return blocks

    return make


def slow_error(block, inputs, targets):
    """The mean square error of all numbers over the variance of the targets about their one mean."""
    made = torch.cat([out.flatten() for out in inputs.outputs(block)]).double()
    wanted = torch.cat([target.flatten() for target in targets]).double()
    return float((made - wanted).square().mean() / wanted.var(unbiased=False))


def loss_of(folder, ids):
    model = transformers_plugin.load(folder, experts_implementation="eager").eval()
    with torch.no_grad():
        return perplexity(token_nll(model(ids, use_cache=False).logits, ids))


def dense_weights(folder):
    """Every parameter of a written checkpoint as the dense model would hold it."""
    model = transformers_plugin.load(folder, experts_implementation="eager")
    names = {name for name, _ in model.named_parameters()}
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PACKED)}
    own = {f"{name}.{part}" for name, m in packed.items() for part in m.parts}
    found = {name: p.detach() for name, p in model.named_parameters() if name in names - own}
    return found | {f"{name}.weight": m.weight.detach() for name, m in packed.items()}


@pytest.mark.parametrize(
    ("recipe", "batch_tokens"),
    [(MASK, 48), ({**MASK, "method": "sparsegpt", "sparsity": 0.6}, 2048), (HALF, 48), (ROM, 2048), (OURS, 48)],
    ids=lambda value: value if isinstance(value, int) else value.get("method", "wanda"),
)  # fmt: skip
def test_the_error_towards_the_dense_blocks_falls(recipe, batch_tokens, model_of, tuned):
    calls = tuned(model_of(), **recipe, batch_tokens=batch_tokens, reconstruct={**TUNE, "steps": 12})
    assert [call.prefix for call in calls] == ["model.layers.0.", "model.layers.1."]
    for call in calls:
        assert call.result.before == pytest.approx(call.before, rel=1e-4)
        assert call.result.after == pytest.approx(call.after, rel=1e-4)
        assert 0 < call.after < 0.97 * call.before


def test_the_second_block_is_tuned_from_the_compressed_ones_input_to_the_dense_ones_output(
    model_of, run, windows, tuned
):
    """Of the blocks walked here; that a run tunes to the same bits from the same streams, see below."""
    folder = model_of()
    seen = [call.hidden for call in tuned(folder, **HALF, reconstruct=TUNE)]
    out, _ = run(folder, **HALF, reconstruct=TUNE)

    def after_blocks(folder):
        model, found = transformers_plugin.load(folder), []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, args, out: found.append(out))
        with torch.no_grad():
            model(windows.ids, use_cache=False)
        return found

    dense, compressed = after_blocks(folder), after_blocks(out)
    for (_, _, target), wanted in zip(seen, dense, strict=True):
        torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1][1], dense[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1][0], compressed[0], rtol=1e-4, atol=1e-5)
    assert (compressed[0] - dense[0]).norm() > 0.05 * dense[0].norm()


@pytest.mark.parametrize("format", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_pruned_stays_exactly_zero_and_the_rest_is_tuned(dtype, format, model_of, run, tuned):
    folder = model_of(dtype=dtype)
    calls = tuned(folder, **MASK, format=format, reconstruct=TUNE)
    out, _ = run(folder, **MASK, format=format, reconstruct=TUNE)
    before, after = load_file(folder / "model.safetensors"), dense_weights(out)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    masks = {f"{name}.weight": edit.keep for call in calls for name, edit in call.edits.items()}
    assert len(masks) == 14 and all(isinstance(e, Masked) for call in calls for e in call.edits.values())
    for name, keep in masks.items():
        assert keep.view(len(keep), -1, 4).sum(-1).eq(2).all()
        assert not after[name].view(bits)[~keep].any(), name  # +0.0, to the last bit
        assert (after[name][keep] != before[name][keep]).float().mean() > 0.2, name
    for name, weight in before.items():
        if name not in masks and weight.dim() > 1:  # embeddings and head
            assert torch.equal(after[name], weight), name


def test_the_first_masks_are_those_of_the_method_without_tuning(model_of, run):
    (one, _), (other, _) = run(model_of(), **MASK, reconstruct=TUNE), run(model_of(), **MASK)
    tuned, plain = dense_weights(one), dense_weights(other)
    for name, weight in plain.items():
        if "layers.0" in name and weight.dim() > 1:
            assert torch.equal(weight == 0, tuned[name] == 0)


@pytest.mark.parametrize("recipe", [MASK, HALF, OURS], ids=["wanda", "svd_llm", "paredown_lowrank"])
def test_the_same_run_twice_writes_the_same_bytes(recipe, model_of, tmp_path, prune, monkeypatch):
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 240)
    ids = torch.randint(3, 128, (24, 24), generator=torch.Generator().manual_seed(0))
    text = Windows(ids, "random", "all", "0")  # more than one batch, so that batches are drawn
    folder, spec = model_of(dtype=torch.bfloat16), {"steps": 3, "batch": 2, "lr": 1e-3}
    for name in ("one", "two"):
        prune(folder, tmp_path / name, **recipe, text=text, reconstruct=spec)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    prune(folder, tmp_path / "three", **recipe, text=text, reconstruct=spec, calibration={"seed": 1})
    assert (tmp_path / "three" / "model.safetensors").read_bytes() != one


@pytest.mark.parametrize("recipe", [MASK, HALF, OURS], ids=["wanda", "svd_llm", "paredown_lowrank"])
def test_everything_is_written_as_it_was_tuned(recipe, model_of, run, tuned):
    """Norms, factors, biases: each number of a block that is tuned here is that of the file that a run writes."""
    folder = model_of()
    calls = tuned(folder, **recipe, reconstruct=TUNE)
    out, _ = run(folder, **recipe, reconstruct=TUNE)
    before, packed = (load_file(f / "model.safetensors") for f in (folder, out))
    dense = dense_weights(out)
    norms = 0
    for call in calls:
        for name, tensor in call.weights.items():
            whole = call.prefix + name
            assert torch.equal(packed[whole] if whole in packed else dense[whole], tensor), whole
            if "norm" in name:
                assert not torch.equal(tensor, before[whole])
                norms += 1
    assert norms == 4
    assert torch.equal(packed["model.norm.weight"], before["model.norm.weight"])  # of no block


@pytest.mark.parametrize(
    ("recipe", "format"),
    [(MASK, "packed"), (MASK, "dense"), (HALF, "packed"), (OURS, "packed")],
    ids=lambda value: value if isinstance(value, str) else value.get("method", "wanda"),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_reloaded_checkpoint_has_the_streamed_loss(recipe, dtype, format, model_of, run, windows):
    out, result = run(model_of(dtype=dtype), **recipe, format=format, reconstruct=TUNE)
    streamed = result.evaluation[0]["after"]["token_perplexity"]
    assert loss_of(out, windows.ids)["token_perplexity"] == pytest.approx(streamed, rel=1e-6)
    assert streamed != result.evaluation[0]["before"]["token_perplexity"]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("qwen2", ROM), ("gpt2", MASK), ("gpt2", ROM), ("opt", HALF), ("gpt_neox", MASK), ("mamba", HALF),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("method", "wanda"),
)  # fmt: skip
def test_other_families_are_tuned_and_reloaded(family, recipe, model_of, tmp_path, prune, windows, tuned):
    folder = model_of(FAMILIES[family])
    result, _ = prune(folder, tmp_path / "out", **recipe, reconstruct=TUNE)
    calls = tuned(folder, **recipe, reconstruct=TUNE)
    assert len(calls) == 2 and all(call.after < call.before for call in calls)
    streamed = result.evaluation[0]["after"]["token_perplexity"]
    assert loss_of(tmp_path / "out", windows.ids)["token_perplexity"] == pytest.approx(streamed, rel=1e-5)
    if recipe is MASK:
        for name, weight in dense_weights(tmp_path / "out").items():
            if name.removesuffix(".weight") in {layer["name"] for layer in result.layers}:
                weight = weight.T if family == "gpt2" else weight
                assert (weight.reshape(len(weight), -1, 4) != 0).sum(-1).le(2).all()


def test_experts_that_were_pruned_stay_zero(model_of, tmp_path, prune, windows):
    folder = model_of(t.MixtralConfig(**C, num_local_experts=4))
    result, _ = prune(folder, tmp_path / "out", **MASK, format="dense", reconstruct=TUNE)
    for name, weight in load_file(tmp_path / "out" / "model.safetensors").items():
        if "experts" in name:
            assert (weight.view(len(weight), -1, 4) != 0).sum(-1).le(2).all() and weight.any()
    streamed = result.evaluation[0]["after"]["token_perplexity"]
    assert loss_of(tmp_path / "out", windows.ids)["token_perplexity"] == pytest.approx(streamed, rel=1e-5)


@pytest.mark.parametrize("recipe", [MASK, HALF, PIFA], ids=["wanda", "svd_llm", "pifa"])
def test_a_rate_is_a_share_of_each_tensors_size(recipe, model_of, tuned):
    """Adam's first step is the rate itself, whatever the gradient."""
    calls = tuned(model_of(), **recipe, reconstruct={"steps": 1, "lr": 1e-3, "batch": 6})
    moved = [
        ((call.weights[name] - p).abs().max(), p.square().mean().sqrt())
        for call in calls
        for name, p in call.edited.items()
    ]
    assert len(moved) >= 2 * 9
    for step, size in moved:
        assert float(step) == pytest.approx(1e-3 * max(float(size), 1e-3), rel=1e-2)


def test_a_windows_input_lies_on_the_line_through_the_two_streams():
    compressed, dense = torch.zeros(64, 3, 2, dtype=torch.bfloat16), torch.ones(64, 3, 2, dtype=torch.bfloat16)
    drawn = interpolated(compressed, dense, torch.Generator().manual_seed(0))
    shares = drawn[:, 0, 0].float()
    assert drawn.dtype == torch.bfloat16 and torch.equal(drawn, drawn[:, :1, :1].expand(-1, 3, 2))
    assert -0.5 <= shares.min() < -0.4 and 1.4 < shares.max() <= 1.5 and 0.4 < shares.mean() < 0.6


@pytest.mark.parametrize("lr", [1e-3, 3.0])
@pytest.mark.parametrize("recipe", [MASK, HALF], ids=["wanda", "svd_llm"])
def test_a_block_is_never_worse_than_before_on_the_calibration_windows(recipe, lr, model_of, run, tuned):
    spec = {**TUNE, "lr": lr, "steps": 6}
    calls = tuned(model_of(), **recipe, reconstruct=spec)
    for call in calls:
        assert call.after <= call.before * (1 + 1e-6) and call.result.after <= call.result.before
    if lr == 3.0:  # too far for any good: what the method made is written
        assert all(call.result.after == call.result.before for call in calls)
        runs = run(model_of(), **recipe, reconstruct=spec), run(model_of(), **recipe)
        tuned, plain = (load_file(out / "model.safetensors") for out, _ in runs)
        assert tuned.keys() == plain.keys() and all(torch.equal(tuned[name], plain[name]) for name in plain)


def test_steps_that_are_too_long_are_taken_at_a_fifth_once(model_of, tuned):
    spec = {**TUNE, "steps": 6}
    long, short = (tuned(model_of(), **HALF, reconstruct={**spec, "lr": lr})[0].result for lr in (0.5, SHORTER * 0.5))
    assert long == short and short.after < short.before


def test_a_rate_under_which_the_tuning_diverges_is_refused(model_of, tmp_path, prune):
    with pytest.raises(PareError, match=r"model.layers.0: reconstruction diverged. Lower reconstruct.lr"):
        prune(model_of(), tmp_path / "out", **HALF, reconstruct={**TUNE, "lr": 1e30})
    assert not (tmp_path / "out").exists()


def test_layers_that_are_not_edited_keep_their_weights_and_norms_do_not(model_of, tmp_path, prune):
    folder = model_of()
    prune(folder, tmp_path / "out", **HALF, targets={"include": ["layers.1.mlp"]}, reconstruct=TUNE)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    same = {name for name in before if name in after and torch.equal(before[name], after[name])}
    changed = {name for name in before if name in after} - same
    assert changed == {f"model.layers.1.{part}_layernorm.weight" for part in ("input", "post_attention")}
    assert {name for name in before if name not in after} == {
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
    }


def test_masks_with_factors_are_tuned_together(model_of, tmp_path, prune, windows, tuned):
    recipe = {"method": "sparse_low_rank", "options": {"sparsity": "2:4", "rank": 2}}
    folder = model_of()
    result, _ = prune(folder, tmp_path / "out", **recipe, reconstruct=TUNE)
    calls = tuned(folder, **recipe, reconstruct=TUNE)
    assert len(calls) == 2 and all(call.after < call.before for call in calls)
    streamed = result.evaluation[0]["after"]["token_perplexity"]
    assert loss_of(tmp_path / "out", windows.ids)["token_perplexity"] == pytest.approx(streamed, rel=1e-5)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"step": 3}, r"reconstruct.step: there is no such key. Did you mean 'steps'\?"),
        ({"steps": 0}, r"reconstruct.steps: .*greater than or equal to 1; found 0"),
        ({"lr": 0}, r"reconstruct.lr: .*greater than 0; found 0"),
        ({"batch": "all"}, r"reconstruct.batch: .*found 'all'"),
        (True, r"reconstruct: .*found True"),
    ],
)
def test_faults_of_the_recipe_are_told(spec, told):
    with pytest.raises(PareError, match=told):
        Recipe.parse({"method": "wanda", "reconstruct": spec})


@pytest.mark.parametrize(
    "recipe", [HALF, OURS, {"method": "sparse_low_rank", "options": {"rank": 2}}], ids=lambda value: value["method"]
)
def test_factors_are_not_tuned_for_a_dense_checkpoint_which_cannot_hold_them(recipe, model_of, tmp_path, prune):
    with pytest.raises(PareError, match=r"tunes factors, which a dense checkpoint cannot hold: write --format packed"):
        prune(model_of(), tmp_path / "out", **recipe, format="dense", reconstruct=TUNE)
    assert not (tmp_path / "out").exists()


def test_the_record_tells_how_each_tensor_is_stored(model_of, tmp_path, prune):
    recipe = {"method": "sparse_low_rank", "options": {"sparsity": 0.5, "rank": 2}}
    _, writer = prune(model_of(), tmp_path / "out", **recipe, reconstruct={"steps": 2})
    assert writer.tensors["model.layers.0.mlp.up_proj.values"]["kind"] == "bitmap_lowrank"


def test_held_out_windows_end_a_training_that_only_fits_the_others(model_of, tuned):
    raw = {"steps": 36, "batch": 1, "lr": 0.03}
    long = tuned(model_of(), **MASK, batch_tokens=24, reconstruct=raw)
    held = tuned(model_of(), **MASK, batch_tokens=24, reconstruct={**raw, "lr": 0.5, "heldout": 3})
    assert all(call.result.steps == 36 for call in long)
    assert any(call.result.steps < 36 and call.result.steps % 6 == 0 for call in held)
    assert all(call.after <= call.before for call in held)


def test_what_had_the_lowest_held_out_error_is_kept(model_of, tuned):
    spec = {"steps": 40, "batch": 2, "lr": 0.01, "heldout": 2}
    calls = tuned(model_of(), **MASK, batch_tokens=24, reconstruct=spec)
    assert calls[0].after < calls[0].before
    for call in calls:
        assert call.result.after == pytest.approx(call.after, rel=1e-4) and call.after <= call.before
        for name, edit in call.edits.items():
            weight = call.weights[f"{name.removeprefix(call.prefix)}.weight"]
            assert not weight[~edit.keep].any()
