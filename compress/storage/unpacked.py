"""On a CPU, for which there is no kernel for packed weights, keep masked weights dense in memory once they were unpacked.

The outputs are the same to the last bit. What is saved, and every name and shape, stays packed.
"""

from math import prod

from torch import nn

from paredown.compress.machine import available_memory
from paredown.compress.progress import logger
from paredown.compress.storage.kinds import MASKS
from paredown.compress.storage.modules import PACKED

MOST = 0.5  # of the memory that is free, unless a person asks


def keep_dense(model: nn.Module, wanted: bool | None = None) -> int:
    """Let the masked weights of a model that are on a CPU stay dense in memory when they are first used; False: no longer.

    None: if they take at most half of the memory that is free; the `paredown` logger says so if they do not. Returns how
    many bytes they take in all. Weights that are moved, trained or compiled are unpacked at each call.
    """
    masked = [m for m in model.modules() if isinstance(m, PACKED) and m.kind in MASKS]
    here = [m for m in masked if all(t.device.type == "cpu" for t in m.tensors().values())]
    size = sum(prod(m.spec.shape) * m.tensors()["values"].element_size() for m in here)
    free = available_memory()
    if wanted is None and size and free is not None and size > MOST * free:
        logger.info(
            "packed weights are unpacked at each call: dense they take %.1f GB, and %.1f GB of memory are free. "
            "To keep them all the same: paredown.compress.load(..., unpack=True)",
            size / 1e9,
            free / 1e9,
        )
        wanted = False
    for module in here:
        module.keeps_dense = wanted is not False
        module.forget()
    return size if here and wanted is not False else 0
