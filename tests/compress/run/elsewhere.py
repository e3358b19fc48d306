"""A second device where there is none: tensors that say they lie `elsewhere` are computed on the CPU, yet refuse to meet
one that does not, as a GPU's would. As a program it compresses models on the CPU and there, and runs the results:

    python tests/compress/run/elsewhere.py JOBS.json

Each job has a folder `model`, a `recipe`, the tokens `ids` and a folder `out`. Prints per job the perplexity after the
run and the loss of the loaded checkpoint, of both.
"""

import json
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ATEN = torch.ops.aten
MOVES = {ATEN._to_copy.default, ATEN.copy_.default}
# a tensor may be indexed by one on the CPU
INDEXING = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}


class There(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, device=torch.device("elsewhere", 0), **layout)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})

    def data_ptr(self):
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()


def is_there(device):
    return device is not None and torch.device(device).type == "elsewhere"


def held(value):
    if isinstance(value, torch.device) and is_there(value):
        return torch.device("cpu")
    return value.held if isinstance(value, There) else value


def computed(func, args, kwargs):
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = {id(t.held): t for t in tensors if isinstance(t, There)}
    strangers = [t for t in tensors if not isinstance(t, There) and t.dim()]
    indexed = func in INDEXING and isinstance(args[0], There)
    if there and strangers and func not in MOVES and not indexed:
        raise RuntimeError(f"{func}: tensors elsewhere and on the CPU, {[[*t.shape] for t in tensors]}")
    device = kwargs.get("device")
    stays = isinstance(args[0], There) if func is ATEN.copy_.default else bool(there) and device is None
    made = func(*tree_map(held, args), **tree_map(held, kwargs))
    if not (stays or is_there(device)):
        return made
    # what was written to in place is the same tensor afterwards
    return tree_map(lambda t: wrapped(t, there) if isinstance(t, torch.Tensor) else t, made)


def wrapped(tensor, there):
    return there[id(tensor)] if id(tensor) in there else There(tensor)


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Called(TorchFunctionMode):
    """What never reaches the dispatcher."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and is_there(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is torch.Tensor.tolist and isinstance(args[0], There):
            return args[0].held.tolist()
        return func(*args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu" if is_there(device) else device)


def main():
    _setup_privateuseone_for_python_backend("elsewhere")
    torch.Generator = Generator
    from paredown.compress.checkpoint import transformers_plugin
    from paredown.compress.checkpoint.source import ModelSource
    from paredown.compress.checkpoint.writer import CheckpointWriter
    from paredown.compress.job import resolve_job
    from paredown.compress.model.stream import BATCH_TOKENS
    from paredown.compress.numerics.divergence import CHUNK_BYTES
    from paredown.compress.numerics.perplexity import target_nll
    from paredown.compress.recipe import Recipe
    from paredown.compress.run.pipeline import Run
    from paredown.compress.run.record import write_record
    from paredown.compress.storage.fuse import fuse
    from paredown.compress.text.windows import Windows

    def run(job, device):
        recipe, folder, out = Recipe.parse(job["recipe"]), Path(job["model"]), Path(job["out"]) / device.type
        windows = Windows(torch.tensor(job["ids"]), "ids", "all", "0")
        with CheckpointWriter(out) as writer:
            made = resolve_job(ModelSource(folder, folder.name, device=device), recipe)
            result = Run(made, windows, [windows], writer).run()
            write_record(writer, made, result, windows)
            writer.commit()
        model, ids = transformers_plugin.load(out).eval().to(device), windows.ids.to(device)
        fuse(model, device.type)
        with torch.no_grad():
            loss = target_nll(model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]).mean()
        return [result.evaluation[0]["after"]["token_perplexity"], loss.item()]

    BATCH_TOKENS["elsewhere"] = BATCH_TOKENS["cpu"]
    CHUNK_BYTES["elsewhere"] = CHUNK_BYTES["cpu"]
    for job in json.loads(Path(sys.argv[1]).read_text()):
        here = run(job, torch.device("cpu"))
        with Dispatched(), Called():
            there = run(job, torch.device("elsewhere", 0))
        print(json.dumps([here, there]), flush=True)


if __name__ == "__main__":
    main()
