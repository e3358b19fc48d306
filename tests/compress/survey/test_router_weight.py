"""Statistics of experts by router weight, against each expert's tokens one by one."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import resolve_job
from paredown.compress.model.blocks import blocks
from paredown.compress.model.routing import RouterWeights
from paredown.compress.model.stream import start
from paredown.compress.numerics.moments import Need
from paredown.compress.recipe import Recipe
from paredown.compress.survey.collect import observe

C = {
    "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "intermediate_size": 24,
}  # fmt: skip
FAMILIES = {
    "mixtral": t.MixtralConfig(**C, num_local_experts=6),
    "qwen3_moe": t.Qwen3MoeConfig(**C, num_experts=6, head_dim=8),
    "olmoe": t.OlmoeConfig(**C, num_experts=6),
    "deepseek_v3": t.DeepseekV3Config(
        **{**C, "num_key_value_heads": 4}, n_routed_experts=6, n_group=1, topk_group=1, first_k_dense_replace=0, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
}  # fmt: skip
NEEDS = frozenset({Need.GRAM, Need.MEAN})


def observed(folder, ids, router_weight=False):
    source = ModelSource(folder, "m", dtype=torch.float32)
    block = blocks(source)[0]
    with source.loaded(block):
        stream = start(source, ids, 48)  # two windows at once
        views = block.views()
        return views, {
            n: s.inputs for n, s in observe(stream, block, views, NEEDS, router_weight=router_weight).items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_counts_in_an_experts_statistics_as_in_its_output(family, tmp_path, save_model, windows):
    model = save_model(tmp_path / "m", FAMILIES[family], torch.float32)
    views, found = observed(tmp_path / "m", windows.ids, router_weight=True)
    experts = [v for v in views if v.expert is not None]
    owner = model.get_submodule(experts[0].owner.rpartition(".")[0])
    calls = []
    owner.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((*args, *kwargs.values())), with_kwargs=True
    )
    with torch.no_grad():
        model(windows.ids, use_cache=False)
    ((hidden, index, weights),) = calls
    sums, counts = {}, {}
    for x, chosen, shares in zip(hidden.double(), index.tolist(), weights.double(), strict=True):
        for e, share in zip(chosen, shares, strict=True):
            gate, up = (owner.gate_up_proj[e].double() @ x).chunk(2)
            for name, input in (("gate_up_proj", x), ("down_proj", torch.nn.functional.silu(gate) * up)):
                key = f"{name}.{e}"
                sums[key] = sums.get(key, 0) + torch.outer(share * input, share * input)
                counts[key] = counts.get(key, 0) + 1
    by_name = {v.name.split("experts.")[1]: found[v.name] for v in experts if v.name in found}
    assert by_name.keys() == sums.keys() and weights.std() > 0
    for name, stats in by_name.items():
        wanted = sums[name].detach() / counts[name]
        torch.testing.assert_close(stats.gram, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_other_layers_and_runs_without_the_key_are_untouched(tmp_path, save_model, windows):
    save_model(tmp_path / "m", FAMILIES["mixtral"], torch.float32)
    views, by_weight = observed(tmp_path / "m", windows.ids, router_weight=True)
    _, plain = observed(tmp_path / "m", windows.ids)
    for view in views:
        same = torch.equal(by_weight[view.name].gram, plain[view.name].gram)
        assert same == (view.expert is None) and by_weight[view.name].count == plain[view.name].count
    assert not any(view.module._forward_pre_hooks for view in views)


def test_a_run_by_router_weight_prunes_other_weights(tmp_path, save_model, prune):
    save_model(tmp_path / "m", FAMILIES["mixtral"], torch.float32)
    for out, options in (("plain", {}), ("weighed", {"router_weight": True})):
        prune(tmp_path / "m", tmp_path / out, **options)
    first, second = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("plain", "weighed"))
    assert first != second


def test_a_router_that_chose_another_number_of_tokens_is_told(tmp_path, save_model, windows):
    save_model(tmp_path / "m", FAMILIES["mixtral"], torch.float32)
    source = ModelSource(tmp_path / "m", "m", dtype=torch.float32)
    block = blocks(source)[0]
    with source.loaded(block):
        views = block.views()
        stream = start(source, windows.ids[:1])
        expert = next(v for v in views if v.expert is not None)
        with RouterWeights(views) as router:
            stream.output(block, 0)
        with pytest.raises(PareError, match=r"1000 tokens, and the router chose it for \d+.*Leave router_weight out"):
            router.of(expert, 1000)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (t.LlamaConfig(**{k: v for k, v in C.items() if "moe" not in k}), "no targeted layer is one of a fused weight"),
        (t.GptOssConfig(**C, num_local_experts=6, head_dim=8), "GptOssExperts is not called with the router's weights"),
    ],
    ids=["no experts", "no weights told"],
)
def test_router_weight_is_refused_where_no_weight_is_told(config, said, tmp_path, save_model):
    save_model(tmp_path / "m", config)
    with pytest.raises(PareError, match=said):
        resolve_job(ModelSource(tmp_path / "m", "m"), Recipe.parse({"method": "wanda", "router_weight": True}))
