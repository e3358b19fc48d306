"""Make report.html again from report.json: python -m paredown.evaluation.html OUT..."""

import sys
from pathlib import Path

from paredown.compress.errors import PareError
from paredown.evaluation.html.page import write_page


def main(folders: list[str]) -> None:
    """Exit with a message where a folder holds no report."""
    if not folders:
        sys.exit(str(__doc__))
    for folder in folders:
        try:
            print(write_page(Path(folder)))
        except (PareError, OSError, ValueError) as fault:
            sys.exit(f"error: {folder}: {fault}")


if __name__ == "__main__":
    main(sys.argv[1:])
