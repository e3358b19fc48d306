"""Packed checkpoints for tests, without a run: the linear layers of a random model, masked or factored."""

import copy

import torch
from torch import nn

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.packed_classes import packed_model_class
from paredown.compress.storage.install import install
from paredown.compress.storage.kinds import KINDS, MASKS, pack
from paredown.compress.storage.spec import Spec


def halves(*shape):
    """2 of every 4, at random."""
    return (torch.rand(*shape[:-1], shape[-1] // 4, 4).argsort(-1) < 2).reshape(shape)


def random_tensors(kind, weight, rank=3):
    """Some tensors of each kind for a weight (out, in): of a mask its own values, of factors small random ones."""
    mask = kind.removesuffix("_lowrank")
    masked = pack(mask, weight, halves(*weight.shape)) if mask in MASKS else {}
    sizes = KINDS[kind].sizes(Spec(kind, tuple(weight.shape), rank=rank, values=weight.numel() // 2))
    tensors = {name: masked.get(name, 0.1 * torch.randn(size)) for name, size in sizes.items()}
    named = {"order": torch.randperm(len(weight)).int()} if "order" in sizes else {}
    return {name: t if name in masked else t.to(weight.dtype) for name, t in {**tensors, **named}.items()} | named


def pack_model(model, kind="bitmap", where=""):
    """A packed model and its dense twin, made of a dense model: the layers of the language model whose name has `where`."""
    dense = copy.deepcopy(model).eval()
    decoder = dense.get_decoder()
    prefix = next(name for name, module in dense.named_modules() if module is decoder)
    tensors, specs = {}, {}
    for name, layer in dense.named_modules():
        inside = name.startswith(prefix) and any(part.isdigit() for part in name.split("."))  # a block
        if isinstance(layer, nn.Linear) and inside and where in name and "dt_proj" not in name:
            counts = {"rank": 3} if kind not in MASKS else {}
            counts |= {"values": layer.weight.numel() // 2} if "values" in KINDS[kind].asks else {}
            specs[name] = Spec(kind, tuple(layer.weight.shape), **counts)
            tensors[name] = random_tensors(kind, layer.weight.data)
            layer.weight.data = KINDS[kind].unpack(tensors[name], tuple(layer.weight.shape))
    config = transformers_plugin.packed_config(dense.config, specs)
    packed = packed_model_class(dense.config.model_type, type(dense).__name__)._from_config(config, dtype=dense.dtype)
    packed.load_state_dict(dense.state_dict())
    install(packed, specs)
    for name, parts in tensors.items():
        layer = packed.get_submodule(name)
        layer.load_state_dict({**layer.state_dict(), **parts})
    return packed.eval(), dense


def pack_folder(model, folder, kind="bitmap", where=""):
    """Save `pack_model(...)`; returns the dense twin."""
    packed, dense = pack_model(model, kind, where)
    packed.save_pretrained(folder)
    return dense
