"""On a CPU, for which there is no kernel for packed weights, keep in memory what makes their products faster.

Masked weights stay dense once they were unpacked: outputs are the same to the last bit. Small PIFA weights keep a left factor
that has its rows in order. What is saved, and every name and shape, stays packed.
"""

from torch import nn

from paredown.compress.machine import available_memory
from paredown.compress.progress import logger
from paredown.compress.storage.kinds import MASKS, kind_of
from paredown.compress.storage.modules import PACKED, PackedLinear

MOST = 0.5  # of the memory that is free, unless a person asks
LINE = 64  # bytes of a line of the cache


def keep_unpacked(model: nn.Module, wanted: bool | None = None) -> int:
    """Let a model's packed weights that are on a CPU keep what they unpack when they are first used; False: no longer.

    None: if that takes at most half of the memory that is free; the `paredown` logger says so if it does not. Returns how
    many bytes they take in all. Weights that are moved, trained or compiled are unpacked at each call.
    """
    packed = [m for m in model.modules() if isinstance(m, PackedLinear) or (isinstance(m, PACKED) and m.kind in MASKS)]
    here = [m for m in packed if all(t.device.type == "cpu" for t in m.tensors().values())]
    sizes = {m: kind_of(m.kind).kept_numbers(m.spec) * next(m.parameters()).element_size() for m in here}
    size, free = sum(sizes.values()), available_memory()
    if wanted is None and free is not None and size > MOST * free:
        logger.info(
            "packed weights are unpacked at each call: kept unpacked they take %.1f GB, and %.1f GB of memory are free. "
            "To keep them all the same: paredown.compress.load(..., unpack=True)",
            size / 1e9,
            free / 1e9,
        )
        wanted = False
    for module, own in sizes.items():
        module.keeps = own > 0 and wanted is not False
        module.forget()
    return size if wanted is not False else 0


def align(model: nn.Module) -> None:
    """Copy what a file's mapping left across lines of the cache, of weights of low rank on a CPU.

    Products by it in bfloat16 take nearly twice as long.
    """
    for module in model.modules():
        if isinstance(module, PACKED) and module.kind not in MASKS:
            for tensor in module.parameters(recurse=False):
                if tensor.device.type == "cpu" and tensor.data_ptr() % LINE:
                    tensor.data = tensor.data.clone()
