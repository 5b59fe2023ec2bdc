"""``python -m dhbe.report DIR... [--out DIR]``: collect result folders into tables and a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from dhbe.core.exit_status import lenient
from dhbe.report import board
from dhbe.report.collect import collect, merge, relabel, select
from dhbe.report.damaged import TITLE, UNREADABLE, Damage, listed
from dhbe.report.failed import failures
from dhbe.report.publish import write_report
from dhbe.report.tables import beside_published, markdown

PUBLISHED = Path(__file__).with_name("published.csv")
"""BackdoorBench's leaderboard and the table of NFT, with their sources."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="result folders, or folders of them")
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
    parser.add_argument(
        "--format",
        nargs="+",
        choices=("png", "svg", "pdf"),
        default=["png"],
        help="of the figures' files (default: png)",
    )
    parser.add_argument(
        "--board",
        type=Path,
        metavar="FOLDER",
        help="put the results into this board, if there are any, and write OUT/board.html",
    )
    options = parser.parse_args()
    if not options.folders and options.board is None:
        parser.error("name result folders, or --board")
    if options.board is not None and (options.where or options.merge or options.compare):
        parser.error("--board takes all results: leave out --where, --merge and --compare")
    lenient()
    try:
        if options.board is not None:
            onto_board(options)
        else:
            report(options)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def onto_board(options: argparse.Namespace) -> None:
    """Add results to the board and draw it.

    Raises:
        ValueError: the board is empty, or one of its files is damaged.
        OSError: it cannot be written.
    """
    if options.folders:
        damaged: list[Damage] = []
        written = board.add(options.folders, options.board, damaged)
        for file in written:
            print(f"written: {file}")
        print(f"written: {len(written)}; left out as damaged: {len(damaged)}")
    print(f"board: {board.board_page(options.board, options.out)}")


def report(options: argparse.Namespace) -> None:
    """Collect, choose, write.

    Raises:
        ValueError: there is nothing to report, or a former report is damaged.
        OSError: the report cannot be written.
    """
    damaged: list[Damage] = []
    table = collect(options.folders, damaged)
    table, failed = relabel(table, failures(options.folders, table, damaged))
    if table.empty and failed.empty:
        where = ", ".join(map(str, options.folders))
        lost = "".join(f"\n  {path}: {cause}" for path, cause in damaged)
        raise ValueError(f"no metrics.json below {where}{' but damaged ones:' * bool(lost)}{lost}")
    known, every = [*table, *failed], pd.concat([table, failed])
    table, failed = (select(t, options.where, known) for t in (table, failed))
    if options.merge:
        former = options.out / "results.csv"
        try:
            table, failed = relabel(merge(former, table), failed)
        except UNREADABLE as error:
            remedy = "delete it, or leave out --merge"
            raise ValueError(f"{former}: damaged former report ({error}); {remedy}") from error
    if table.empty and failed.empty:
        columns = [w.partition("=")[0] for w in options.where]
        there = "; ".join(f"{c}: {', '.join(sorted(set(map(str, every[c]))))}" for c in columns)
        raise ValueError(f"no run has {' '.join(options.where)}; there are {there}")
    extra = {TITLE: listed(damaged)}
    if options.compare and len(table):
        published = pd.read_csv(options.compare)
        extra["Beside published figures"] = beside_published(table, published)
    tables = write_report(table, failed, options.out, extra, options.format)
    print(markdown(tables["ACC / ASR by attack"]))
    print(f"report: {options.out / 'index.html'}")


if __name__ == "__main__":
    main()
