"""``python -m dhbe.report DIR... [--out DIR]``: collect result folders into tables and a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dhbe.report.collect import markdown, write_report


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="result folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/report"))
    options = parser.parse_args()
    try:
        summary = write_report(options.folders, options.out)
    except FileNotFoundError as error:
        sys.exit(f"error: {error}")
    print(markdown(summary))
    print(f"report: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
