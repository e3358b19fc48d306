"""config.json of a model folder: read without any code from the folder, and checked."""

from pathlib import Path
from typing import Any

import torch

from paredown.compress.checkpoint import transformers_plugin
from paredown.compress.checkpoint.tensor_files import Entry
from paredown.compress.errors import PareError


def load_config(folder: Path) -> Any:
    """config.json through transformers, without any code from the folder.

    Raises PareError if there is none, or if transformers does not know its model type.
    """
    from transformers import AutoConfig

    transformers_plugin.register()
    if not (folder / "config.json").exists():
        raise PareError(f"{folder} has no config.json: it is not a Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError) as fault:
        raise PareError(
            f"{folder / 'config.json'} is not of a model type that this transformers knows: {first_line(fault)} "
            "Upgrade transformers, or name another model."
        ) from fault
    # a checkpoint must not choose code; experts run one by one, so that each can be observed
    config._attn_implementation = None
    config._experts_implementation = "eager"
    return config


def stored_dtype(config: Any, entries: dict[str, Entry]) -> torch.dtype:
    """As `from_pretrained(dtype="auto")`: the dtype in config.json, else that of the first floating-point tensor."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, torch.dtype):
        return dtype
    floats = (e.dtype for e in entries.values() if e.dtype.is_floating_point)
    return next(floats, torch.float32)


def first_line(fault: BaseException) -> str:
    """Of its message, or of its repr where it has none."""
    return (str(fault).strip() or repr(fault)).splitlines()[0]
