"""What is decoded, token by token or by a graph, is what the model computes."""

import pytest
import torch
import transformers as t

from paredown.compress.errors import PareError
from paredown.evaluation.decoding import Decoding, cache_bytes, graphs_or_eager, use_graphs

C = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SSM = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
FAMILIES = {
    "llama": t.LlamaConfig(**C),
    "a window shorter than the context": t.MistralConfig(**C, sliding_window=8),
    "a window that ends while decoding": t.MistralConfig(**C, sliding_window=20),
    "a window that holds everything": t.MistralConfig(**C, sliding_window=64),
    "windows in every other layer": t.Gemma2Config(**C, head_dim=16, sliding_window=8),
    "gpt2": t.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "opt": t.OPTConfig(
        vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, word_embed_proj_dim=64,
    ),
    "experts": t.MixtralConfig(**C, num_local_experts=4),
    "mamba": t.MambaConfig(**SSM),
    "mamba2": t.Mamba2Config(**SSM, num_heads=8, head_dim=16, n_groups=1, expand=2),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoded_token_is_that_of_a_plain_forward(family, random_model):
    model = random_model(FAMILIES[family])
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    run = Decoding(model, ids, 16)
    wanted = model(ids, use_cache=False).logits  # (batch, token, vocabulary)
    for _ in range(2):  # the second time the cache is used again
        run.start()
        run.prefill()
        torch.testing.assert_close(run.logits[:, -1], wanted[:, 15], rtol=1e-4, atol=1e-4)
        for place in range(16, 24):
            run.step()
            torch.testing.assert_close(run.logits[:, -1], wanted[:, place], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.plain(), wanted[:, [16, 23]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run.run_once(), wanted[:, [16, 23]], rtol=1e-4, atol=1e-4)


def test_a_rewound_cache_decodes_the_same_again(llama, random_model):
    run = Decoding(llama, torch.randint(3, 128, (2, 24)), 16)
    once = run.run_once()[:, 1]
    run.rewind()
    run.decode()
    assert run.rewindable and torch.equal(run.logits[:, -1], once)
    windowed = random_model(FAMILIES["a window shorter than the context"])
    assert not Decoding(windowed, torch.zeros(1, 24, dtype=torch.long), 16).rewindable


class Graph:
    """Stands in for a CUDA graph of a step: a replay writes to the logits of that step, and Python does not run."""

    def __init__(self, step):
        step()
        self.run, self.logits = step.__self__, step.__self__.logits

    def replay(self):
        held = self.run.logits
        self.run.step()
        self.logits.copy_(self.run.logits)
        self.run.logits = held


class Forgetful(Graph):
    """It does not move on: every step is the same one."""

    def replay(self):
        pass


def test_a_captured_step_is_used_only_if_it_computes_what_the_model_computes(llama):
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))

    def attempt(capture):
        runs = {"model": Decoding(llama, ids, 16)}
        return use_graphs(runs, {"model": {"first": 1e-6, "last": 1e-6}}, capture)

    assert attempt(lambda calls: {name: Graph(call) for name, call in calls.items()}) is None
    frozen = attempt(lambda calls: {name: Forgetful(call) for name, call in calls.items()})
    assert frozen == "the captured step of model does not compute what the model computes"
    assert attempt(lambda calls: None) == "a step cannot be captured into one"


def test_if_one_model_cannot_be_captured_all_are_made_anew_and_run_without_a_graph(llama):
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
    runs = {name: Decoding(llama, ids, 16) for name in ("model", "against")}
    before, wanted = dict(runs), runs["model"].plain()
    errors = {name: {"first": 1e-6, "last": 1e-6} for name in runs}
    kinds = {"model": Graph, "against": Forgetful}
    assert graphs_or_eager(runs, errors, lambda calls: {name: kinds[name](call) for name, call in calls.items()}) == (
        "the captured step of against does not compute what the model computes"
    )
    assert list(runs) == ["model", "against"] and all(runs[name] is not before[name] for name in runs)
    for run in runs.values():
        torch.testing.assert_close(run.run_once(), wanted, rtol=1e-4, atol=1e-4)


class WithoutStaticCache(t.LlamaForCausalLM):
    def forward(self, input_ids, past_key_values=None, **options):
        if past_key_values is not None:
            raise RuntimeError("The expanded size of the tensor must match")
        return super().forward(input_ids, **options)


def test_a_model_that_no_static_cache_fits_is_refused(tiny_config):
    with pytest.raises(PareError, match="WithoutStaticCache cannot run with a static cache"):
        cache_bytes(WithoutStaticCache(tiny_config).eval(), 24)


def test_a_model_that_cannot_run_at_all_raises_its_own_error(llama):
    llama.model.norm = torch.nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        cache_bytes(llama, 24)
