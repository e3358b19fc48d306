"""Post-training compression of language models.

Importing this package teaches transformers to load packed checkpoints: `AutoModelForCausalLM.from_pretrained` then works
on them as on any other model.
"""

from typing import TYPE_CHECKING, Any

from paredown.compress import loading
from paredown.compress.errors import PareError
from paredown.compress.fusing import fuse
from paredown.compress.recipe import Recipe

if TYPE_CHECKING:
    from paredown.commands.compress import compress

loading.register()

__all__ = ["PareError", "Recipe", "compress", "fuse"]


def __getattr__(name: str) -> Any:
    # the whole run stands with the commands, which know evaluation too; imported when it is first asked for
    if name == "compress":
        from paredown.commands.compress import compress

        return compress
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
