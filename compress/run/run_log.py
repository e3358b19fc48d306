"""log.jsonl of OUT: a line of JSON, with the time, for each block, step, score and remark of a run.

The numbers go to a board too, if a person asked for one. A run that goes on after an interruption adds to the log.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paredown.compress.checkpoint.writer import LOG
from paredown.compress.progress import BlockDone, Measured, Progress
from paredown.compress.run.boards import Board, Name, open_board
from paredown.evaluation.schema import Report
from paredown.evaluation.tables import text_name

SCORE = "score"


class RunLog:
    """What a run tells, as lines that wait until its folder is known. `begin` is the first of them."""

    def __init__(self, begin: Mapping[str, Any], board: Board | None = None) -> None:
        self._lines: list[str] = []
        self._folder: Path | None = None
        self._board, self._scored = board, 0
        self._add({"kind": "begin", **begin})

    def told(self, shown: Progress) -> Progress:
        """The same callbacks, of which the log hears too."""

        def block(done: BlockDone) -> None:
            values = {"kept": done.kept, "relative_error": done.relative_error, "seconds": done.seconds}
            self.measured(Measured("block", done.index, {**values, "peak_memory": done.peak_memory}, done.name))
            shown.block(done)

        def note(text: str) -> None:
            self._add({"kind": "note", "text": str(text)})
            shown.note(text)

        def measured(numbers: Measured) -> None:
            self.measured(numbers)
            shown.measured(numbers)

        return Progress(block, note, shown.doing, measured)

    def into(self, folder: Path) -> None:
        """Write into this folder from now on, after what is there: all lines so far, and what comes."""
        if folder != self._folder:
            self._folder = folder
            self._write(self._lines)

    def measured(self, numbers: Measured) -> None:
        """A line for these numbers; on the board they are a step of their kind."""
        own = {"name": numbers.name} if numbers.name else {}
        self._add({"kind": numbers.of, "step": numbers.step, **own, **numbers.values})
        if self._board is not None:
            of = f"{SCORE}/{numbers.name}" if numbers.of == SCORE else numbers.of
            try:
                self._board.log(of, numbers.step, numbers.values)
            except Exception as fault:  # whatever a library raises: no work is lost for a board
                self._add({"kind": "note", "text": f"the board takes no more numbers ({fault})"})
                self._board = None

    def scores(self, report: Report) -> None:
        """A line for each text and task that was scored."""
        for entry in report["evaluation"]:
            apart = {"kl_mean": entry["divergence"]["kl_mean"]} if "divergence" in entry else {}
            before, after = entry["before"]["token_perplexity"], entry["after"]["token_perplexity"]
            values = {"before": before, "after": after, "log_ratio": entry["paired_delta"]["log_ratio"], **apart}
            self.measured(Measured(SCORE, self._scored, values, text_name(entry)))
        for task, metrics in report["tasks"].items():
            for metric, score in metrics.items():
                values = {"before": score["before"], "after": score["after"]}
                self.measured(Measured(SCORE, self._scored, values, f"{task} {metric}"))
        self._scored += 1

    def close(self) -> None:
        """Say on the board that the run is over."""
        if self._board is not None:
            self._board.close()

    def _add(self, content: Mapping[str, Any]) -> None:
        line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **content})
        self._lines.append(line)
        self._write([line])

    def _write(self, lines: list[str]) -> None:
        if self._folder is not None and self._folder.is_dir():  # it is OUT by now, or gone
            with (self._folder / LOG).open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)


@contextmanager
def logged(
    begin: Mapping[str, Any], out: Path, board: Name | None, shown: Progress
) -> Iterator[tuple[RunLog, Progress]]:
    """The log of a run into `out`, and callbacks that it hears of. Raises PareError if the board cannot be opened."""
    opened = open_board(board, out, begin) if board else None
    log = RunLog(begin, opened)
    told = log.told(shown)
    if opened is not None:
        told.note(f"logged to {opened.place}")
    try:
        yield log, told
    finally:
        log.close()
