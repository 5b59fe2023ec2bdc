"""The collected report: tables and figures as files, and one page that needs nothing else."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib
import pandas as pd

from dhbe.core.exit_status import UNWRITABLE
from dhbe.report.collect import OPTIONS, OPTIONS_FILE
from dhbe.report.failed import SHOWN
from dhbe.report.figures import figures
from dhbe.report.legend import METRICS, explained
from dhbe.report.page import data_url
from dhbe.report.tables import compare, latex, markdown, matrix, ranking, summarize
from dhbe.report.texts import drawing, neutral

HIDDEN = ["case", "method", "folder"]
"""Columns of runs that the page leaves out."""


def write_report(
    table: pd.DataFrame,
    failed: pd.DataFrame,
    out: Path,
    extra: dict[str, pd.DataFrame],
    formats: Sequence[str] = ("png",),
) -> dict[str, pd.DataFrame]:
    """Write the report of ``collect``'s table into ``out``; returns its tables by title.

    ``results.csv`` and ``results.parquet`` (every run), ``options.json`` (the options behind their
    hashes), ``tables.md``, ``tables.tex``, figures, and ``index.html``, one self-contained page.

    Args:
        failed: ``failures``; with an empty ``table`` the report is about these alone.
        extra: more tables by title.
        formats: of the figures' files: ``png``, ``svg``, ``pdf``.
    """
    out.mkdir(parents=True, exist_ok=True)
    options = {
        name: found
        for column in ("case", "method")
        for name, found in zip(table[column], table[f"{column}_options"], strict=True)
        if found
    }
    (out / OPTIONS_FILE).write_text(json.dumps(options, default=str))
    runs = table.drop(columns=OPTIONS)
    neutral(runs).to_csv(out / "results.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    runs.to_parquet(out / "results.parquet", index=False)
    tables = {"ACC / ASR by attack": matrix(table, failed=failed)}
    if len(table):
        tables |= {
            "RA / DER by attack": matrix(table, ("ra", "der"), failed),
            "Ranks": ranking(table),
            "Pairs of defenses": compare(table),
            "Means over seeds": summarize(table),
        }
    tables |= extra | {"Failed or skipped": failed[SHOWN]}
    tables = {title: found for title, found in tables.items() if not found.empty}
    sections = [f"## {title}\n\n{markdown(found)}" for title, found in tables.items()]
    (out / "tables.md").write_text("\n".join(sections), encoding="utf-8", errors=UNWRITABLE)
    parts = [f"% {title}\n{latex(found)}" for title, found in tables.items()]
    (out / "tables.tex").write_text("\n".join(parts), encoding="utf-8", errors=UNWRITABLE)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dhbe.report", "templates"), autoescape=True
    )
    page = environment.get_template("collection.html").render(
        tables=tables | {"Every run": runs.drop(columns=HIDDEN, errors="ignore")},
        pictures=write_figures(table, out, formats) if len(table) else [],
        metrics=METRICS,
        explained=explained,
    )
    (out / "index.html").write_text(page, encoding="utf-8", errors=UNWRITABLE)
    return tables


def write_figures(
    table: pd.DataFrame, out: Path, formats: Sequence[str] = ("png",)
) -> list[dict[str, str]]:
    """Write the figures of ``collect``'s table; ``source`` (PNG) and ``caption`` for the page."""
    pictures = []
    with drawing(), matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):
        for name, caption, figure in figures(table):
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            for kind in formats:
                if kind == "png":
                    (out / f"{name}.png").write_bytes(buffer.getvalue())
                else:
                    figure.savefig(out / f"{name}.{kind}")
            pictures.append({"source": data_url(buffer.getvalue()), "caption": caption})
    return pictures
