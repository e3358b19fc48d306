"""Every open question about a GPU, answered by one command in the time that there is.

    python -m paredown.evaluation.benchmarks.gpu --minutes 15 --out DIR [--only PART ...] [--skip PART ...] [--rehearse]

Parts, each in processes of its own and with a share of the time: device, selftest, kernels, devices, whole, solvers, decode,
sanitizer, recover, serve (see parts.py). What one does not use goes to the next ones; one that fails stops no other. After
each part DIR holds gpu.json, gpu.md, to be pasted into the pages that it names, and the part's log; the part `kernels` leaves
the dispatch table in DIR/kernels. A second run with the same DIR adds its parts to those of the first. Large files (about 60
GB for a whole model) go to --work, where they stay for a second run. --rehearse runs every part in miniature on a CPU.

Prints a table last. The exit status is 1 if a part failed; a missed bar is no failure.
"""

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paredown.compress.errors import PareError
from paredown.compress.machine import pick_device
from paredown.evaluation.benchmarks.gpu import rehearsal, report
from paredown.evaluation.benchmarks.gpu.parts import IN_MINIATURE, ON_A_GPU, PROGRAMME, Setting
from paredown.evaluation.benchmarks.gpu.programme import Outcome, ending_children_when_terminated, run
from paredown.evaluation.surroundings import surroundings
from paredown.evaluation.terminal import out_console, show_note

WIDTH = 150  # of the last table, also where it is piped into a file
TOOLS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
# whole lines, as soon as they are printed: a log is read even if its process was stopped
PRINTED = {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "TQDM_DISABLE": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> int:
    chosen = arguments().parse_args()
    rehearsed, out = chosen.rehearse, chosen.out.absolute()
    try:
        device = pick_device("cpu" if rehearsed else chosen.device)
    except PareError:
        sys.exit(
            f"error: --device {chosen.device}: no such GPU here. --rehearse runs every part in miniature on a CPU."
        )
    out.mkdir(parents=True, exist_ok=True)
    here = surroundings(device)
    changes = environment(out, rehearsed)
    work, sizes = (chosen.work or out / "work").absolute(), IN_MINIATURE if rehearsed else ON_A_GPU
    setting = Setting(sizes, str(device), here["device"]["name"], out, work, {**os.environ, **changes})
    names = [name for name in PROGRAMME if name in (chosen.only or PROGRAMME) and name not in chosen.skip]
    head = report.heading(here, chosen.minutes, rehearsed)
    before = report.earlier(out, head)

    def keep(outcomes: list[Outcome]) -> None:
        known = before | {one.name: one for one in outcomes}
        report.write(out, head, [known[name] for name in PROGRAMME if name in known])

    with ending_children_when_terminated():
        parts = [PROGRAMME[name](setting) for name in names]
        outcomes = run(parts, out, 60 * chosen.minutes, changes, keep, show_note)
    Console(width=max(out_console.width, WIDTH)).print(table(outcomes))
    return int(any(outcome.failed for outcome in outcomes))


def table(outcomes: list[Outcome]) -> Table:
    """A row for each part."""
    rows = report.summary(outcomes)
    shown = Table(*rows.headers, box=None)
    for row in rows.rows:
        shown.add_row(*map(Text, row))
    return shown


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--work", type=Path, help="a folder for large files; default: DIR/work")
    parser.add_argument("--only", nargs="+", choices=PROGRAMME, default=[], metavar="PART")
    parser.add_argument("--skip", nargs="+", choices=PROGRAMME, default=[], metavar="PART")
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature on a CPU")
    parser.add_argument("--device", default="cuda")
    return parser


def environment(out: Path, rehearsed: bool) -> dict[str, str]:
    """What the processes of the programme find in their environment, beside what this one has."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), *TOOLS))
    found = {
        **PRINTED,
        **OFFLINE,
        "PATH": path,
        "PAREDOWN_CACHE": str(out),
    }  # the part `kernels` leaves its table there
    return found | (rehearsal.environment(out / "rehearsal", path) if rehearsed else {})


if __name__ == "__main__":
    sys.exit(main())
