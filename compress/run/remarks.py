"""Warnings on what a reader of the figures might not expect of the texts."""

from collections.abc import Iterator, Sequence

from paredown.compress.checkpoint.companions import tokenizer_sha256
from paredown.compress.checkpoint.source import ModelSource
from paredown.compress.errors import PareError
from paredown.evaluation.reference import model_path

BUNDLED = "stdlib"


def only_stdlib(source: ModelSource, calibrates: Sequence[str], scores: Sequence[str]) -> Iterator[str]:
    """A sentence if a model that was not trained on it is calibrated, or scored, on the bundled text alone.

    The bundled model, and what is made of it, is known by its tokenizer.
    """
    uses = {"calibrated": calibrates, "scored": scores}
    alone = [what for what, names in uses.items() if names and set(names) == {BUNDLED}]
    if not alone or source.tokenizer_sha256() == _bundled_tokenizer():
        return
    options = {"calibrated": "--calibration my-text.txt", "scored": "--eval-text my-text.txt"}
    yield (
        f"the model is {' and '.join(alone)} on {BUNDLED} alone, which is Python source code: what it does to other text "
        f"cannot be told from that. Name text like that of its use: {' '.join(options[what] for what in alone)}"
    )


def _bundled_tokenizer() -> str | None:
    try:
        return tokenizer_sha256(model_path())
    except PareError:  # it was not installed
        return None
