"""Models with parameters of other sizes than their config says, and without some modules."""

import pytest
import torch
import transformers as t
from torch import nn
from transformers.pytorch_utils import Conv1D

from paredown.compress import PareError
from paredown.compress.checkpoint.quantizer import read_settings
from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import FORMAT_VERSION
from paredown.compress.storage.shapes import Absent, Shapes, remove, resize
from paredown.compress.storage.spec import Spec

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
MLP = "model.layers.0.mlp"


@pytest.fixture
def llama():
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES)).eval()


class Layers(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 8, dtype=torch.bfloat16), Conv1D(8, 6)
        self.experts = nn.Parameter(torch.zeros(2, 6, 8))


def test_linear_layers_know_their_new_sizes_and_keep_dtype_and_device():
    model = Layers()
    resize(model, {"linear.weight": [5, 4], "linear.bias": [5], "conv.weight": [4, 5], "conv.bias": [5]})
    assert (model.linear.out_features, model.linear.in_features) == (5, 4) and model.linear.weight.shape == (5, 4)
    assert (model.conv.nx, model.conv.nf) == (4, 5) and model.conv.weight.shape == (4, 5)
    assert model.linear.weight.dtype == torch.bfloat16 and model.conv.weight.dtype == torch.float32
    assert model.linear(torch.zeros(2, 4, dtype=torch.bfloat16)).shape == model.conv(torch.zeros(2, 4)).shape == (2, 5)
    with torch.device("meta"):
        away = nn.Sequential(nn.Linear(6, 8))
    resize(away, {"0.weight": [8, 3]})
    assert away[0].weight.is_meta


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"linaer.weight": [5, 6]}, "'linaer.weight'.*no parameter of this name.*Did you mean"),
        ({"linear": [5, 6]}, "'linear'.*no parameter of this name"),
        ({"linear.weight": [5]}, r"'linear.weight': \[5\] is no smaller form of the model's \[8, 6\]"),
        ({"linear.weight": [8, 7]}, "'linear.weight'.*no smaller form"),
        ({"linear.weight": [0, 6]}, "'linear.weight'.*no smaller form"),
        ({"linear.weight": [5, 6]}, "the layer gives 5 numbers, and its bias has 8"),
        ({"conv.bias": [3]}, "'conv.bias': the layer gives 8 numbers, and its bias has 3"),
        ({"experts": [1, 6, 8]}, "'experts': a Layers reads its sizes from the config"),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name_and_nothing_is_changed(sizes, why):
    model = Layers()
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with pytest.raises(PareError, match=why):
        resize(model, {"linear.bias": [8], **sizes})
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_a_shared_parameter_keeps_its_size(llama):
    with pytest.raises(PareError, match=r"'model.embed_tokens.weight': it is shared"):
        resize(llama, {"model.embed_tokens.weight": [30, 16]})


def test_an_absent_module_gives_zeros_like_its_input_in_the_form_in_which_the_module_gave_them(llama):
    names = {*llama.state_dict()}
    remove(llama, ["model.layers.1.self_attn", MLP])
    gone = (f"{MLP}.", "model.layers.1.self_attn.")
    assert {*llama.state_dict()} == {name for name in names if not name.startswith(gone)}
    hidden, layer = torch.randn(1, 3, 16), llama.model.layers[1]
    output, rest = layer.self_attn(hidden_states=hidden, attention_mask=None)
    assert torch.equal(output, torch.zeros_like(hidden)) and rest is None
    assert torch.equal(llama.model.layers[0].mlp(hidden), torch.zeros_like(hidden))
    assert isinstance(layer.self_attn, Absent) and layer.self_attn.values == 2
    assert llama(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize("name", ["", "model.layers.7.mlp", "model.layers.0.mlp.act_fn", f"{MLP}.gate_proj"])
def test_what_is_no_part_of_a_block_cannot_be_absent(name, llama):
    with pytest.raises(PareError, match=f"absent module '{name}'.*no module of this name that holds layers"):
        remove(llama, [name])


def test_packed_weights_take_the_place_of_layers_with_sizes_of_their_own(llama):
    shapes = Shapes(
        {f"{MLP}.{name}_proj.weight": (20, 16) for name in ("gate", "up")} | {f"{MLP}.down_proj.weight": (16, 20)}
    )
    shapes.apply(llama)
    with pytest.raises(PareError, match=r"the spec's shape is \[16, 24\], the model's \[16, 20\]"):
        install(llama, {f"{MLP}.down_proj": Spec("lowrank", (16, 24), rank=3)})
    install(llama, {f"{MLP}.down_proj": Spec("lowrank", (16, 20), rank=3)})
    assert llama.get_submodule(f"{MLP}.down_proj").in_features == 20


def settings(**tables):
    return {"version": FORMAT_VERSION, "modules": {}, **tables}


def test_the_tables_are_read_as_they_were_written():
    shapes = Shapes({"a.weight": (3, 4)}, ("b",))
    assert read_settings(settings(**shapes.to_json())) == ({}, shapes)
    assert shapes.to_json() == {"sizes": {"a.weight": [3, 4]}, "absent": ["b"]}
    assert not read_settings(settings())[1] and Shapes().to_json() == {}


@pytest.mark.parametrize(
    "tables",
    [
        {"sizes": [["a", [1]]]},
        {"sizes": {"a": "12"}},
        {"sizes": {"a": [1, 2.5]}},
        {"sizes": {"a": [True]}},
        {"sizes": {"a": []}},
        {"sizes": {"a": [-1]}},
        {"sizes": {"a": None}},
        {"absent": "model.layers.0.mlp"},
        {"absent": [3]},
        {"absent": {"a": 1}},
    ],
)
def test_damaged_tables_are_told(tables):
    with pytest.raises(PareError, match=f"{next(iter(tables))} in config.json"):
        read_settings(settings(**tables))
