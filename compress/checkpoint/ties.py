"""Weights that share one tensor, as `from_pretrained` would tie them: by the config, and by what the files hold."""

from typing import Any

import torch
from torch import Tensor, nn

from paredown.compress.checkpoint.origins import Origin
from paredown.compress.checkpoint.tensor_files import TensorFiles


def settle_ties(model: Any, found: dict[str, Origin], files: TensorFiles) -> list[str]:
    """Untie weights of the skeleton `model` that the files hold twice with different values; returns their names.

    `found` gains the weights that are stored under the name of their copy only. Values are read only where both are stored.
    """
    apart = []
    for copy, original in list(model.all_tied_weights_keys.items()):
        if copy in found and original in found:
            if not _equal(found[copy], found[original], files):
                del model.all_tied_weights_keys[copy]
                _untie(model, copy)
                apart.append(copy)
        elif copy in found:
            found[original] = found[copy]
    if apart and not model.all_tied_weights_keys:
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
    return apart


def _equal(one: Origin, other: Origin, files: TensorFiles) -> bool:
    """Whether two weights are stored with the same values. Those that a converter makes are not compared, and stay apart."""
    if one.keys == other.keys:
        return True
    if one.converter is not None or other.converter is not None:
        return False
    read = files.read((*one.keys, *other.keys), finite=False)
    first, second = read[one.keys[0]], read[other.keys[0]]
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _untie(model: nn.Module, name: str) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    shared: Tensor = getattr(module, leaf)
    module._parameters[leaf] = nn.Parameter(torch.empty_like(shared), requires_grad=False)
