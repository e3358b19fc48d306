"""Faults a user can mend: the message says what was found, what was wanted and what to type next."""

from collections.abc import Iterable
from difflib import get_close_matches


class PareError(ValueError):
    """A fault in what the user gave us. The command line prints its message and exits with 1, without a traceback."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `choices`, or an empty string. To be appended to a message."""
    near = get_close_matches(word, list(choices), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
