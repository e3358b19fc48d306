"""The weight of a layer that writes to the residual stream, towards what the stream should be there."""

import pytest
import torch
import transformers as t

from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.model import stream as stream_module
from paredown.compress.model.blocks import blocks
from paredown.compress.model.stream import start
from paredown.compress.survey.collect import groups
from paredown.compress.survey.products import run_with_capture
from paredown.compress.survey.refit import refit_towards
from paredown.compress.survey.residual import ResidualLayers, silenced

C = {
    "vocab_size": 96, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.3,
}  # fmt: skip
CONFIGS = {
    "llama": t.LlamaConfig(**C),
    "llama with biases": t.LlamaConfig(**C, attention_bias=True, mlp_bias=True),
    "gpt2": t.GPT2Config(vocab_size=96, n_embd=24, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3),
}
IDS = torch.randint(3, 96, (7, 16), generator=torch.Generator().manual_seed(0))


class Case:
    """Block 0 of a model whose block 1 is removed; `wanted` is the dense stream before block 2."""

    def __init__(self, folder):
        self.source = ModelSource(folder, "m")
        self.stream, dense = start(self.source, IDS), start(self.source, IDS)
        self.block, *_ = all_blocks = blocks(self.source)
        for block in all_blocks[:2]:
            with self.source.loaded(block):
                dense.advance(block)
        self.wanted = dense.hidden

    def residual_layers(self):
        return ResidualLayers.of(self.stream, self.block, groups(self.stream, self.block, self.block.views()))

    def fitted(self, view, later, damping=0.1):
        return refit_towards(self.stream, self.block, view, later, self.wanted.__getitem__, damping)

    @torch.no_grad()
    def seen(self, view, later):
        """The layer's inputs y (tokens, in), and what the stream behind it misses (tokens, out), float64."""
        with silenced(later):
            runs = [run_with_capture(self.stream, self.block, view, i) for i in range(len(self.wanted))]
        y = torch.cat([x.flatten(0, -2) for _, x, _ in runs]).double()
        missing = [
            (w.double() - output.double()).flatten(0, 1) for w, (output, *_) in zip(self.wanted, runs, strict=True)
        ]
        return y, torch.cat(missing)


@pytest.fixture(params=CONFIGS)
def case(request, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = t.AutoModelForCausalLM.from_config(CONFIGS[request.param], dtype=torch.float32).eval()
    for name, p in model.named_parameters():
        if name.endswith(".bias"):  # they are made as zeros
            p.data.normal_()
    model.save_pretrained(tmp_path / "m")
    monkeypatch.setitem(stream_module.BATCH_TOKENS, "cpu", 48)  # three windows in a batch, and one in the last
    return Case(tmp_path / "m")


def test_the_weight_is_that_of_a_direct_regression_and_brings_the_stream_nearer(case):
    with case.source.loaded(case.block):
        layers = case.residual_layers()
        assert len(layers.views) == 2
        for view in layers.views:
            later, weight = layers.after(view), view.weight.double()
            y, missing = case.seen(view, later)
            size = y.square().mean()
            rows = torch.cat([y, (len(y) * 0.1 * size).sqrt() * torch.eye(y.shape[1]).double()])
            aims = torch.cat([missing, torch.zeros(y.shape[1], missing.shape[1]).double()])
            change = torch.linalg.lstsq(rows, aims, driver="gelsd").solution.T  # (out, in)
            found = case.fitted(view, later)
            assert found.shape == view.shape and found.dtype == torch.float64
            torch.testing.assert_close(found, weight + change, rtol=1e-4, atol=1e-5)
            view.assign(found.float())
            _, left = case.seen(view, later)
            assert left.square().sum() < 0.95 * missing.square().sum()
            torch.testing.assert_close(left, missing - y @ change.T, rtol=0, atol=1e-4)  # the bias is where it was


def test_a_stream_that_misses_nothing_keeps_its_weight(case):
    with case.source.loaded(case.block):
        layers = case.residual_layers()
        for view in layers.views:
            with silenced(layers.after(view)), torch.no_grad():
                case.wanted = list(case.stream.outputs(case.block))
            assert torch.equal(case.fitted(view, layers.after(view)), view.weight.double())


def test_more_damping_holds_the_weight_nearer_to_what_it_was(case):
    with case.source.loaded(case.block):
        view = case.residual_layers().views[-1]
        moved = [float((case.fitted(view, [], damping) - view.weight).norm()) for damping in (0.01, 0.1, 1.0, 100.0)]
    assert moved == sorted(moved, reverse=True) and 0 < moved[-1] < 0.2 * moved[0]


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_target_that_is_not_finite_is_refused_by_the_layers_name(case):
    case.wanted = [hidden * torch.nan for hidden in case.wanted]
    with case.source.loaded(case.block):
        view = case.residual_layers().views[-1]
        with pytest.raises(PareError, match=r"^model\.layers\.0\.mlp\.down_proj: what its output should be holds NaN"):
            case.fitted(view, [])


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_layer_that_no_token_reaches_keeps_its_weight(case):
    with case.source.loaded(case.block):
        view = case.residual_layers().views[-1]
        case.block.module.mlp.forward = torch.zeros_like
        assert torch.equal(case.fitted(view, []), view.weight.double())
