"""The documents of the task `stdlib_lines`: which line of a standard library module comes next?

Eight lines of a module are the context; the choices are the line that follows and three other lines of the same module,
as deep and about as long. The text is read at run time from the evaluation split of the corpus `stdlib`, so nothing is
downloaded and nothing is copied. The selection depends on the text alone: the same Python gives the same documents.
"""

import hashlib
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from paredown.compress.text.stdlib_text import documents

CONTEXT_LINES = 8
CHOICES = 4
DOCUMENTS = 500

# A choice says something and fits on a line; what is compared in length is the text without its indentation.
SHORTEST, LONGEST = 20, 100
LENGTH_TOLERANCE = 0.25

# No module gives more documents than this, so that the few largest do not become the task.
PER_MODULE = 30


@dataclass(frozen=True)
class Line:
    """One line that may be a choice: where it stands, how deep, and what it says."""

    number: int
    text: str

    @property
    def words(self) -> str:
        return self.text.strip()

    @property
    def depth(self) -> int:
        return len(self.text) - len(self.text.lstrip())


def dataset(**_: Any) -> dict[str, Any]:
    """`{"test": datasets.Dataset}`, as lm-eval's `custom_dataset` wants it; the keywords are the YAML's metadata."""
    from datasets import Dataset

    return {"test": Dataset.from_list(questions())}


def questions(limit: int = DOCUMENTS) -> list[dict[str, Any]]:
    """At most `limit` documents `{module, context, choices, answer}`, the modules taking turns."""
    by_module = [_module_questions(document.module, document.text) for document in documents("evaluation")]
    turns = (question for turn in zip_longest(*by_module) for question in turn if question is not None)
    return [question for question, _ in zip(turns, range(limit), strict=False)]


def _module_questions(module: str, text: str) -> list[dict[str, Any]]:
    """The questions of one module in an order drawn from their own text; no two ask about neighbouring lines."""
    lines = [line.rstrip() for line in text.expandtabs().splitlines()]
    asked = [number for number in range(CONTEXT_LINES, len(lines)) if _may_ask(lines, number)]
    candidates = [Line(number, line) for number, line in enumerate(lines) if _may_answer(line)]
    found: list[dict[str, Any]] = []
    taken: set[int] = set()
    for number in sorted(asked, key=lambda number: _draw(*lines[number - CONTEXT_LINES : number + 1])):
        if len(found) == PER_MODULE:
            break
        if taken.isdisjoint(range(number - 2, number + 3)) and (question := _question(lines, number, candidates)):
            taken.add(number)
            found.append({"module": module, **question})
    return found


def _question(lines: list[str], number: int, candidates: list[Line]) -> dict[str, Any] | None:
    """The question whose answer is line `number`, or `None` where the module has too few lines like it."""
    truth = Line(number, lines[number])
    context = lines[number - CONTEXT_LINES : number]
    # A line that the context already holds would be right or wrong by mere copying.
    seen = {line.strip() for line in context}
    alike = {line.words: line for line in candidates if line.words not in seen | {truth.words} and _alike(line, truth)}
    if truth.words in seen or len(alike) < CHOICES - 1:
        return None
    key = "\n".join(context) + "\n" + truth.text
    wrong = sorted(alike, key=lambda words: _draw(key, words))[: CHOICES - 1]
    choices = [alike[words].text for words in wrong]
    answer = _draw(key) % CHOICES
    choices.insert(answer, truth.text)
    return {"context": "\n".join(context), "choices": choices, "answer": answer}


def _alike(line: Line, truth: Line) -> bool:
    """As deep, about as long, and not a neighbour that could as well come next."""
    near = abs(line.number - truth.number) <= CONTEXT_LINES
    length = len(truth.words)
    return not near and line.depth == truth.depth and abs(len(line.words) - length) <= LENGTH_TOLERANCE * length


def _may_ask(lines: list[str], number: int) -> bool:
    """The answer can be a choice, and the context neither ends in a blank line nor is mostly blank."""
    context = lines[number - CONTEXT_LINES : number]
    return _may_answer(lines[number]) and bool(context[-1]) and sum(map(bool, context)) >= CONTEXT_LINES - 2


def _may_answer(line: str) -> bool:
    words = line.strip()
    return SHORTEST <= len(words) <= LONGEST and sum(map(str.isalpha, words)) >= len(words) // 2


def _draw(*parts: str) -> int:
    """A number drawn from text: alike in every process, which `hash` is not."""
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8], "big")
