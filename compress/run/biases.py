"""What becomes of added biases in an ordinary checkpoint: some families have a setting for them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.bias_flags import with_biases
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.compress.job import Job
from paredown.compress.model.blocks import View


def dense_export(job: Job, targets: Sequence[View]) -> str:
    """Whether what a job packs can be exported as an ordinary checkpoint, in words."""
    if job.source.shapes:
        return "does not work: no config describes blocks with sizes of their own"
    if job.method.without_bias() == job.method:
        return "works"
    bare = [view.name for view in targets if view.expert is None and view.bias is None]
    if not bare:
        return "works"
    if with_biases(_dense(job.source), bare) is not None:
        return "works: the config's settings of biases are switched on"
    return f"does not work: {bare[0]} gets a bias, and {job.source.family} models have no place for it (affine=false: none)"


def dense_form(source: ModelSource) -> tuple[Any, dict[str, Tensor]]:
    """The config of the dense model that a packed checkpoint becomes, and the biases that it has more than its family's.

    None and none where the config needs no change. Raises PareError if added biases have no place in the family's models.
    """
    added = [name for name, spec in source.modules.items() if spec.bias]
    if not added:
        return None, {}
    found = with_biases(_dense(source), added)
    if found is None:
        raise PareError(
            f"{added[0]} carries a bias that an ordinary {source.family} checkpoint cannot hold ({len(added)} in all): "
            "compress again with --set affine=false, or keep the packed checkpoint."
        )
    return found


def _dense(source: ModelSource) -> Any:
    return transformers_plugin.dense_config(source.config)
