"""``python -m dhbe.report DIR... [--out DIR]``: collect result folders into tables and a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from dhbe.report.collect import collect, merge, relabel, select
from dhbe.report.failed import failures
from dhbe.report.publish import write_report
from dhbe.report.tables import beside_published, markdown

PUBLISHED = Path(__file__).with_name("published.csv")
"""BackdoorBench's leaderboard and the table of NFT, with their sources."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="result folders, or folders of them")
    parser.add_argument("--out", type=Path, default=Path("outputs/report"))
    parser.add_argument(
        "--where", nargs="+", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these runs"
    )
    parser.add_argument(
        "--merge", action="store_true", help="keep the runs of a former OUT/results.csv"
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        type=Path,
        const=PUBLISHED,
        metavar="CSV",
        help="show published figures beside ours (without CSV: those that come with dhbe)",
    )
    options = parser.parse_args()
    table = collect(options.folders)
    table, failed = relabel(table, failures(options.folders, table))
    if table.empty and failed.empty:
        sys.exit(f"error: no metrics.json below {', '.join(map(str, options.folders))}")
    known = [*table, *failed]
    try:
        table, failed = (select(t, options.where, known) for t in (table, failed))
    except ValueError as error:
        sys.exit(f"error: {error}")
    if options.merge:
        table, failed = relabel(merge(options.out / "results.csv", table), failed)
    if table.empty and failed.empty:
        sys.exit(f"error: no run has {' '.join(options.where)}")
    extra = {}
    if options.compare and len(table):
        published = pd.read_csv(options.compare)
        extra["Beside published figures"] = beside_published(table, published)
    tables = write_report(table, failed, options.out, extra)
    print(markdown(tables["ACC / ASR by attack"]))
    print(f"report: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
