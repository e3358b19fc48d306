"""The ids that a tokenizer gives for a few texts: two tokenizers that agree on them are taken for one."""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paredown.compress.checkpoint.companions import left_behind, write_companions
from paredown.compress.checkpoint.configs import first_line
from paredown.compress.checkpoint.hub import load_tokenizer
from paredown.compress.errors import PareError

TEXTS = (
    "Hello world! It's 12,345.67 o'clock, isn't it?",
    "  two spaces,\ta tab,\n\nempty lines and a trailing space ",
    "na\u00efve Gr\u00f6\u00dfe \u4f60\u597d \u043f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d \U0001f642 \ufb01",
    "def f(x):\n    return {'a': x ** 2}  # <b>1e-5</b>",
)


def probe_tokens(tokenizer: Any) -> dict[str, list[int]]:
    """Text -> ids, with the special tokens that the tokenizer adds; the last text is all of its special tokens."""
    texts = [*TEXTS, "".join(map(str, tokenizer.all_special_tokens))]
    return {text: _ids(tokenizer, text) for text in texts}


def check_companions(folder: Path, tokenizer: Any) -> list[str]:
    """A sentence for each file of a model that will not go along.

    Raises PareError if the tokenizer, which is that of the folder, is not the same without them, and for a damaged
    generation_config.json, with which what is written could not be loaded.
    """
    _check_generation(folder)
    told = left_behind(folder)
    if told:
        with TemporaryDirectory(prefix="paredown-") as out:
            write_companions(folder, Path(out))
            shutil.copyfile(folder / "config.json", Path(out) / "config.json")
            if fault := next(token_faults(Path(out), probe_tokens(tokenizer)), None):
                raise PareError(f"{' '.join(told)} Without it the checkpoint has no tokenizer, or another one: {fault}")
    return told


def _check_generation(folder: Path) -> None:
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    try:
        if path.exists():
            GenerationConfig.from_pretrained(folder)
    except Exception as fault:  # whatever the class does with a value that it did not expect
        raise PareError(
            f"{path} cannot be read ({first_line(fault)}), so that no model loads with it. Mend it, or remove it."
        ) from fault


def token_faults(folder: Path, recorded: Mapping[str, Any]) -> Iterator[str]:
    """A sentence if the tokenizer of a checkpoint cannot be loaded, or gives other ids than were recorded."""
    if not recorded:
        return
    try:
        tokenizer = load_tokenizer(folder)
    except PareError as fault:
        yield str(fault)
        return
    for text, ids in recorded.items():
        found = _ids(tokenizer, text)
        if found != ids:
            kind = type(tokenizer).__name__
            yield f"the tokenizer ({kind}) gives other ids than the model's own: of {text!r} {found}, not {ids}"
            return


def _ids(tokenizer: Any, text: str) -> list[int]:
    return [int(i) for i in tokenizer(text)["input_ids"]]
