"""Post-training compression of language models.

Importing this package teaches transformers to load packed checkpoints: `AutoModelForCausalLM.from_pretrained` then works
on them as on any other model. torch and transformers themselves are imported when something of ours is first used.

compress, plan, recover, merge, evaluate, bench, verify, export: of the commands of these names
load: a packed or dense checkpoint as a model             fuse: join packed layers after `.to("cuda")`
enable_peft: LoRA of peft adapts packed layers too
Recipe, PareError: what is done, and what went wrong      register, WeightMethod, ...: `paredown.compress.methods`
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from paredown.compress import progress
from paredown.compress.checkpoint.on_import import on_import
from paredown.compress.errors import PareError

if TYPE_CHECKING:
    from paredown.compress.checkpoint.transformers_plugin import load
    from paredown.compress.recipe import Recipe
    from paredown.compress.run.bench import bench
    from paredown.compress.run.compress import compress
    from paredown.compress.run.evaluate import evaluate
    from paredown.compress.run.export import export
    from paredown.compress.run.merge import merge
    from paredown.compress.run.plan import plan
    from paredown.compress.run.recover import recover
    from paredown.compress.run.verify import verify
    from paredown.compress.serving.adapters import enable_peft
    from paredown.compress.storage.fuse import fuse


def _register() -> None:
    from paredown.compress.checkpoint import transformers_plugin

    transformers_plugin.register()


on_import("transformers", _register)
logger = progress.logger

try:
    __version__ = version("paredown")
except PackageNotFoundError:  # run from its sources
    __version__ = "unknown"

__all__ = [
    "PareError",
    "Recipe",
    "__version__",
    "bench",
    "compress",
    "enable_peft",
    "evaluate",
    "export",
    "fuse",
    "load",
    "logger",
    "merge",
    "plan",
    "recover",
    "verify",
]

# imported when it is first asked for: name -> its module
_LATE = {
    **{
        name: f"paredown.compress.run.{name}"
        for name in ("bench", "compress", "evaluate", "export", "merge", "plan", "recover", "verify")
    },
    "Recipe": "paredown.compress.recipe",
    "enable_peft": "paredown.compress.serving.adapters",
    "fuse": "paredown.compress.storage.fuse",
    "load": "paredown.compress.checkpoint.transformers_plugin",
}


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
