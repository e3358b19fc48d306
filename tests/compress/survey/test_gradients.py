"""The streaming backward pass against autograd through the whole model: hooks for gradients of outputs, `.grad` for Fisher."""

from functools import partial
from itertools import product

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import GRADIENT_NEEDS
from paredown.compress.survey.gradients import backward, head_gradients

C = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "llama": t.LlamaConfig(**C),
    "llama tied": t.LlamaConfig(**C, tie_word_embeddings=True),
    "qwen3": t.Qwen3Config(**C, head_dim=16),
    "gemma2": t.Gemma2Config(**C, head_dim=16, sliding_window=4),
    "opt": t.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt post-norm": t.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": t.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "gpt_neox": t.GPTNeoXConfig(**C),
    "falcon": t.FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4),
    "mixtral": t.MixtralConfig(**C, num_local_experts=6, num_experts_per_tok=2),
    "mamba": t.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=8),
    "mamba2": t.Mamba2Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=3, state_size=8, num_heads=4, head_dim=16, n_groups=1, expand=2
    ),
}
IDS = torch.randint(3, 64, (5, 9), generator=torch.Generator().manual_seed(0))
PER_SEQUENCE = frozenset({"fisher", "fisher_rows"})


@pytest.fixture
def source_of(tmp_path, save_model):
    """`source_of(config)`: a model in float64, in memory and as a source."""

    def make(config, dtype=torch.float64):
        model = save_model(tmp_path / "m", config, dtype)
        return model, ModelSource(tmp_path / "m", "m", dtype=dtype)

    return make


@pytest.fixture
def scratch(tmp_path):
    (tmp_path / "scratch").mkdir()
    return tmp_path / "scratch"


def views_of(source):
    return {v.name: v for block in blocks(source) for v in block.views()}


def of_views(source, tensors):
    """Tensors (of the shape) of whole parameters as (out, in), by name of the view."""
    found = {}
    for name, view in views_of(source).items():
        if view.expert is None:
            tensor = tensors[f"{name}.weight"]
            found[name] = tensor.T if view.layout == "conv1d" else tensor
        else:
            found[name] = tensors[view.owner][view.expert]
    return found


def walked(source, scratch, stream=None, needs=GRADIENT_NEEDS, **options):
    """Statistics by layer."""
    stats, chosen = {}, set(views_of(source))
    stream = start(source, IDS) if stream is None else stream
    for _, found in backward(source, stream, chosen, frozenset({"gram"}), frozenset(needs), scratch, **options):
        stats |= found
    return stats


def close(found, wanted, rtol=1e-4):
    assert found.shape == wanted.shape and found.dtype == torch.float64
    assert (found - wanted).abs().max() <= rtol * wanted.abs().max() and wanted.abs().max() > 0


def token_by_token(module, hidden, chosen, shares, keep):
    """A mixture's experts as the papers write it: each token is sent to its experts one by one."""
    made = []
    for x, experts, weights in zip(hidden, chosen, shares, strict=True):
        total = 0
        for e, share in zip(experts.tolist(), weights, strict=True):
            both = keep(f"gate_up_proj.{e}", x, module.gate_up_proj[e] @ x)
            gate, up = both.chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            total = total + share * keep(f"down_proj.{e}", inner, module.down_proj[e] @ inner)
        made.append(total)
    return torch.stack(made).to(hidden.dtype)


def traced(model, source, ids=IDS):
    """x (tokens, in) and dL/dy (tokens, out) of every layer, and dL/dh (tokens, hidden) of the last block's output h."""
    calls, outs = {}, []

    def keep(name, x, out):
        out.retain_grad()
        calls.setdefault(name, []).append((x.detach(), out))
        return out

    def keep_block(module, args, out):
        outs.append(out[0] if isinstance(out, tuple) else out)
        outs[-1].retain_grad()

    def hook(name, module, args, out):
        keep(name, args[0], out)

    for name, view in views_of(source).items():
        if view.expert is None:
            model.get_submodule(name).register_forward_hook(partial(hook, name))
        else:
            owner = view.owner.rpartition(".")[0]
            experts = model.get_submodule(owner)
            # on the instance, so that the class stays what it is
            experts.forward = partial(
                token_by_token, experts, keep=lambda n, x, out, owner=owner: keep(f"{owner}.{n}", x, out)
            )
    model.get_submodule(blocks(source)[-1].prefix.rstrip(".")).register_forward_hook(keep_block)
    loss = model(ids, labels=ids, use_cache=False).loss * (len(ids) * (ids.shape[1] - 1))
    loss.backward()
    found = {}
    for name, made in calls.items():
        x = torch.cat([x.reshape(-1, x.shape[-1]) for x, _ in made]).double()
        delta = torch.cat([out.grad.reshape(-1, out.shape[-1]) for _, out in made]).double()
        found[name] = x, delta
    return found, outs[0].grad.flatten(0, 1).double()


def weight_gradients(model, source, ids):
    """dL/dW (out, in) of each layer for some windows, by autograd on the weights themselves."""
    model.zero_grad()
    (model(ids, labels=ids, use_cache=False).loss * (len(ids) * (ids.shape[1] - 1))).backward()
    return of_views(source, {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_autograd_over_the_whole_model(family, source_of, scratch):
    model, source = source_of(FAMILIES[family])
    stats = walked(source, scratch)
    calls, _ = traced(model, source)
    weights = of_views(source, {name: p.detach() for name, p in model.named_parameters()})
    assert stats.keys() == calls.keys()
    wide = tall = 0
    for name, (x, delta) in calls.items():
        found, count = stats[name], len(x)
        assert found.inputs.count == count
        weight, moment = weights[name], delta.T @ delta / count  # (out, in), (out, out)
        if weight.shape[0] > weight.shape[1]:
            moment, tall = weight.T @ moment @ weight, tall + 1
        else:
            wide += 1
        close(found.gradient("output_gradient"), moment)
        close(found.gradient("output_gradient_diagonal"), delta.square().mean(0))
        close(found.gradient("weight_gradient"), delta.T @ x / count)
        close(found.gradient("fisher_rows_per_token"), (delta.square() * x.square().sum(1, keepdim=True)).mean(0))
        close(found.inputs.gram, x.T @ x / count)
    assert wide and tall


@pytest.mark.parametrize(
    ("family", "windows_at_once"),
    # an expert is given tokens of all windows in an order of its own: its Fisher is right one window at a time
    [*product(["llama", "qwen3", "opt", "gpt2", "gpt_neox", "mamba"], [1, 2, 5]), ("mixtral", 1)],
)
def test_fisher_squares_each_sequences_own_weight_gradient(family, windows_at_once, source_of, scratch):
    model, source = source_of(FAMILIES[family])
    stats = walked(source, scratch, start(source, IDS, windows_at_once * IDS.shape[1]), PER_SEQUENCE)
    total = {}
    for window in IDS:
        for name, gradient in weight_gradients(model, source, window[None]).items():
            total[name] = total.get(name, 0) + gradient.double().square()
    assert stats.keys() <= total.keys()
    assert all(not total[name].any() for name in total.keys() - stats.keys())  # experts that no token reached
    for name, found in stats.items():
        close(found.gradient("fisher"), total[name] / found.inputs.count)
        close(found.gradient("fisher_rows"), total[name].sum(1) / found.inputs.count)


def test_only_what_is_asked_for_is_collected(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    stats = walked(source, scratch, needs={"fisher_rows"})
    found = stats["model.layers.0.mlp.up_proj"]
    assert found.gradient("fisher_rows").shape == (48,)
    for other in GRADIENT_NEEDS - {"fisher_rows"}:
        with pytest.raises(RuntimeError, match="was not collected"):
            found.gradient(other)
    with pytest.raises(ValueError, match="unknown statistics"):
        walked(source, scratch, needs={"hessian"})


def test_layers_that_are_not_chosen_are_not_observed_and_change_nothing(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    whole = walked(source, scratch)
    name, needs = "model.layers.0.self_attn.v_proj", frozenset({"output_gradient"})
    found = {}
    for _, stats in backward(source, start(source, IDS), {name}, frozenset(), needs, scratch):
        found |= stats
    assert list(found) == [name]
    assert torch.equal(found[name].gradient("output_gradient"), whole[name].gradient("output_gradient"))


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt post-norm", "gemma2", "mamba"])
def test_labels_are_shifted_once(family, length, source_of):
    """The gradient that enters at the head is that of transformers' own `labels=` loss times its targets."""
    model, source = source_of(FAMILIES[family])
    ids = IDS[:, :length].contiguous()
    walk = start(source, ids)
    for block in blocks(source):
        source.materialise(block.prefix, block.names)
        walk.advance(block)
        source.release(block.prefix, block.names)
    found = torch.cat(head_gradients(source, walk, "data"))
    _, wanted = traced(model, source, ids)
    torch.testing.assert_close(found.double(), wanted.view_as(found), rtol=1e-5, atol=1e-6)
    assert not found[:, -1].any() and found[:, :-1].any(-1).all()  # nothing follows the last token


@pytest.mark.parametrize(("windows_at_once", "head_tokens"), [(1, 3), (2, 4), (4, 5), (5, 1)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba"])
def test_the_size_of_a_batch_changes_nothing(family, windows_at_once, head_tokens, source_of, scratch):
    _, source = source_of(FAMILIES[family])
    whole = walked(source, scratch)
    found = walked(source, scratch, start(source, IDS, windows_at_once * IDS.shape[1], head_tokens))
    assert found.keys() == whole.keys()
    for name, stats in found.items():
        assert stats.inputs.count == whole[name].inputs.count == IDS.numel()
        close(stats.inputs.gram, whole[name].inputs.gram, 1e-5)
        for need in GRADIENT_NEEDS:
            close(stats.gradient(need), whole[name].gradient(need), 1e-5)


def test_sampled_labels_are_drawn_the_same_way_every_time(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    one, two, data = (walked(source, scratch, labels=labels) for labels in ("sampled", "sampled", "data"))
    for name in one:
        assert torch.equal(one[name].gradient("fisher"), two[name].gradient("fisher"))
        assert not torch.allclose(one[name].gradient("fisher"), data[name].gradient("fisher"), rtol=0.1)


def test_sampled_labels_give_the_true_fisher_on_average(source_of, scratch):
    """One window many times over: its moments approach sum_t J_t^T (diag p_t - p_t p_t^T) J_t, J_t = dlogits_t/dy."""
    config = t.LlamaConfig(**{**C, "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2})
    model, source = source_of(config)
    for layer in (model.model.embed_tokens, model.lm_head):  # under small weights all labels are equally likely
        layer.weight.data *= 30
    model.save_pretrained(source.folder)
    source = ModelSource(source.folder, "m", dtype=torch.float64)
    window = torch.tensor([[3, 9, 4, 12]])
    kept = {}
    names = [n for n, v in views_of(source).items() if v.shape[0] <= v.shape[1]]
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda module, args, out, n=n: kept.update({n: out}))
        for n in names
    ]
    logits = model(window, use_cache=False).logits[0, :-1].double()  # (positions, vocabulary)
    for hook in hooks:
        hook.remove()
    chances = logits.softmax(-1)
    wanted = {n: 0 for n in names}
    for position, p in zip(logits, chances, strict=True):
        rows = [torch.autograd.grad(one, [kept[n] for n in names], retain_graph=True) for one in position]
        for i, n in enumerate(names):
            jacobian = torch.stack([row[i][0] for row in rows])  # (vocabulary, tokens, out)
            score = torch.eye(len(p), dtype=torch.float64) - p  # of each label: d log p_y / dlogits (vocabulary, ..)
            of_label = torch.einsum("yv,vto->yto", score, jacobian)
            wanted[n] = wanted[n] + torch.einsum("y,yto,ytq->oq", p, of_label, of_label) / window.numel()
    sampled = walked(source, scratch, start(source, window.repeat(4000, 1)), {"output_gradient"}, labels="sampled")
    data = walked(source, scratch, start(source, window), {"output_gradient"}, labels="data")
    for name in names:
        exact = wanted[name].detach()
        error = (sampled[name].gradient("output_gradient") - exact).norm() / exact.norm()
        assert error < 0.06, name
        assert (data[name].gradient("output_gradient") - exact).norm() / exact.norm() > 0.2, name


def test_one_block_is_in_memory_at_a_time_and_the_scratch_folder_is_left_empty(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    prefixes = [block.prefix for block in blocks(source)]
    seen, told = [], []

    def note(text):
        told.append(text)
        assert all(p.is_meta for name, p in source.model.named_parameters() if name.startswith(tuple(prefixes)))

    for block, stats in backward(
        source, start(source, IDS), set(views_of(source)), frozenset(), frozenset({"fisher"}), scratch, note=note
    ):
        seen.append(block.prefix)
        assert set(stats) == {v.name for v in block.views()}
        for name, parameter in source.model.named_parameters():
            assert parameter.is_meta != name.startswith(block.prefix), name
        assert len(list(scratch.iterdir())) == block.index  # inputs of the blocks that are yet to come
    assert seen == prefixes[::-1] and len(told) == 2 * len(prefixes)
    assert not list(scratch.iterdir()) and all(p.is_meta for p in source.model.parameters())


def test_the_weights_have_no_gradients_of_their_own(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    for block, _ in backward(source, start(source, IDS), set(views_of(source)), frozenset(), GRADIENT_NEEDS, scratch):
        assert all(p.grad is None and not p.requires_grad for p in block.module.parameters())


def test_gradients_that_are_not_finite_name_the_layer(source_of, scratch):
    """Tiny hidden states before a large final norm: finite losses, and gradients that float16 cannot hold."""
    model, source = source_of(FAMILIES["llama"], torch.float16)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 1e-3
        model.model.norm.weight.fill_(2e4)
    model.save_pretrained(source.folder)
    source = ModelSource(source.folder, "m")
    with torch.no_grad():
        assert model(IDS, labels=IDS).loss.isfinite()
    with pytest.raises(PareError, match=r"layers.2.*its gradients are not finite. Try --dtype bfloat16"):
        walked(source, scratch)


def test_a_block_that_cannot_be_differentiated_is_told(source_of, scratch):
    _, source = source_of(FAMILIES["llama"])
    layer = source.model.model.layers[1]
    whole = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: whole(hidden.detach(), *args, **kwargs)
    with pytest.raises(PareError, match=r"model.layers.1 cannot be differentiated"):
        walked(source, scratch)
