"""Post-training compression of language models.

Importing this package teaches transformers to load packed checkpoints: `AutoModelForCausalLM.from_pretrained` then works
on them as on any other model.
"""

from typing import TYPE_CHECKING, Any

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.errors import PareError
from paredown.compress.recipe import Recipe
from paredown.compress.storage.fuse import fuse

if TYPE_CHECKING:
    from paredown.compress.run.compress import compress

transformers_plugin.register()

__all__ = ["PareError", "Recipe", "compress", "fuse"]


def __getattr__(name: str) -> Any:
    # the whole run stands with the commands, which know evaluation too; imported when it is first asked for
    if name == "compress":
        from paredown.compress.run.compress import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
