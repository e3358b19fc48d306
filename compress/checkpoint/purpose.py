"""What a checkpoint was made for, where the class that its config.json names is not that of a language model."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from paredown.compress.checkpoint.origins import Origin
from paredown.compress.errors import PareError

OTHER_HEADS = re.compile(r"(^|\.)(score|scores|classifier|v_head|value_head|reward_head|regression_head|qa_outputs)\.")


def check_purpose(
    model: Any, architectures: Iterable[str] | None, found: Mapping[str, Origin], unknown: Iterable[str]
) -> list[str]:
    """A remark on a class that has no output head, though `model` has. `found` are its stored weights, `unknown` others.

    Raises PareError for a model of another task, such as a reward model, without the output head of a language model.
    """
    ours = type(model).__name__.removeprefix("Packed")
    named = next((name.removeprefix("Packed") for name in architectures or ()), ours)
    head = _head_name(model)
    if named == ours or head is None or head in found:
        return []
    if other := next((key for key in unknown if OTHER_HEADS.search(key)), None):
        raise PareError(
            f"config.json says architectures: [{named}], and the files hold {other!r} in the place of {head}: this is no "
            f"causal language model. Name one whose class is {ours}."
        )
    if named.endswith("Model") and not named.endswith("LMHeadModel"):
        return [f"architectures in config.json says {named}, which has no output head: the embedding serves as one"]
    return []


def _head_name(model: Any) -> str | None:
    """The name of the output head's weight."""
    head = model.get_output_embeddings()
    return next((f"{name}.weight" for name, module in model.named_modules() if module is head), None)
