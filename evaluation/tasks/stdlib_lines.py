"""The documents of the task `stdlib_lines`: which line of a standard library module comes next?

The context is eight lines of a module. The choices are the line that follows and three other lines of the same module, with
the same indentation and about the same length. The text is read at run time from the evaluation split of the corpus
`stdlib`: nothing is downloaded or copied. The selection depends on the text alone, so the same version of Python gives the
same documents.
"""

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from paredown.compress.text.stdlib_text import documents

CONTEXT_LINES = 8
CHOICES = 4
DOCUMENTS = 500

# characters of a choice without its indentation
SHORTEST, LONGEST = 20, 100
LENGTH_TOLERANCE = 0.25  # largest difference in length from the answer, as a share of the answer's length

PER_MODULE = 30  # documents at most, so that a few large modules do not dominate the task


@dataclass(frozen=True)
class Line:
    """One line of a module: `number` counts from 0, `depth` is its indentation in characters."""

    number: int
    text: str

    @property
    def words(self) -> str:
        return self.text.strip()

    @property
    def depth(self) -> int:
        return len(self.text) - len(self.text.lstrip())


def dataset(**_: Any) -> dict[str, Any]:
    """`{"test": datasets.Dataset}`, as lm-eval's `custom_dataset` needs it. It passes the YAML's metadata as keywords."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions())}


def questions(limit: int = DOCUMENTS) -> list[dict[str, Any]]:
    """At most `limit` documents `{module, context, choices, answer}`, one from each module in turn."""
    by_module = [_module_questions(document.module, document.text) for document in documents("evaluation")]
    turns = (question for turn in zip_longest(*by_module) for question in turn if question is not None)
    return [question for question, _ in zip(turns, range(limit), strict=False)]


def _module_questions(module: str, text: str) -> list[dict[str, Any]]:
    """The questions of one module, in an order given by the hash of their text; never about lines within two of another."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    answers = [number for number in range(CONTEXT_LINES, len(lines)) if _may_ask(lines, number)]
    candidates = [Line(number, line) for number, line in enumerate(lines) if _may_answer(line)]
    selected: list[dict[str, Any]] = []
    used: set[int] = set()
    for number in sorted(answers, key=lambda number: _hash(*lines[number - CONTEXT_LINES : number + 1])):
        if len(selected) == PER_MODULE:
            break
        if used.isdisjoint(range(number - 2, number + 3)) and (question := _question(lines, number, candidates)):
            used.add(number)
            selected.append({"module": module, **question})
    return selected


def _question(lines: list[str], number: int, candidates: list[Line]) -> dict[str, Any] | None:
    """The question whose answer is line `number`, or `None` if the module has too few similar lines."""
    truth = Line(number, lines[number])
    context = lines[number - CONTEXT_LINES : number]
    # a choice that is in the context could be preferred only because it repeats it
    seen = {line.strip() for line in context}
    similar = {
        line.words: line for line in candidates if line.words not in seen | {truth.words} and _similar(line, truth)
    }
    if truth.words in seen or len(similar) < CHOICES - 1:
        return None
    key = "\n".join(context) + "\n" + truth.text
    wrong = sorted(similar, key=lambda words: _hash(key, words))[: CHOICES - 1]
    choices = [similar[words].text for words in wrong]
    answer = _hash(key) % CHOICES
    choices.insert(answer, truth.text)
    return {"context": "\n".join(context), "choices": choices, "answer": answer}


def _similar(line: Line, truth: Line) -> bool:
    """Same indentation, about the same length, and not so near that it could come next as well."""
    near = abs(line.number - truth.number) <= CONTEXT_LINES
    length = len(truth.words)
    return not near and line.depth == truth.depth and abs(len(line.words) - length) <= LENGTH_TOLERANCE * length


def _may_ask(lines: list[str], number: int) -> bool:
    """Whether line `number` can be a choice, and its context does not end in a blank line and holds at most two of them."""
    context = lines[number - CONTEXT_LINES : number]
    return _may_answer(lines[number]) and bool(context[-1]) and sum(map(bool, context)) >= CONTEXT_LINES - 2


def _may_answer(line: str) -> bool:
    """Whether a line can be a choice: of suitable length, and at least half letters."""
    words = line.strip()
    return SHORTEST <= len(words) <= LONGEST and sum(map(str.isalpha, words)) >= len(words) // 2


def _hash(*parts: str) -> int:
    """A 64-bit hash of text that is the same in every process, unlike Python's `hash`."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
