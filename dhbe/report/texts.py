"""Escape untrusted names and messages for CSV, Markdown and figures.

They may hold what spreadsheets take for a formula, browsers for markup, and matplotlib for a
formula between dollars. Pages escape by themselves (jinja2), LaTeX tables too (pandas).
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axis import Axis
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from dhbe.core.exit_status import UNWRITABLE

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠", "'")
"""First characters that a spreadsheet may act upon, and the one that keeps it from that."""


def neutral(table: pd.DataFrame) -> pd.DataFrame:
    """The table for a CSV file: an apostrophe stands before text that looks like a formula."""
    return _each_text(table, lambda v: f"'{v}" if v.startswith(FORMULA) else v)


def original(table: pd.DataFrame) -> pd.DataFrame:
    """The table that ``neutral`` was given, read back."""
    return _each_text(table, lambda v: v[1:] if v[:1] == "'" and v[1:].startswith(FORMULA) else v)


def printable(value: Any) -> Any:
    """The same, in dicts and lists too, with what no UTF-8 can hold told by its code.

    Names of files may be in Latin-1; Python keeps such bytes as lone surrogates.
    """
    if isinstance(value, str):
        return value.encode("utf-8", UNWRITABLE).decode()
    if isinstance(value, dict):
        return {printable(k): printable(v) for k, v in value.items()}
    return [printable(v) for v in value] if isinstance(value, list) else value


def _each_text(table: pd.DataFrame, change: Callable[[str], str]) -> pd.DataFrame:
    table = table.copy()
    for name in table.columns:
        if not pd.api.types.is_numeric_dtype(table[name]):
            values = [change(v) if isinstance(v, str) else v for v in table[name]]
            table[name] = pd.Series(values, index=table.index, dtype=table[name].dtype)
    return table


def decimals(value: float | None, digits: int) -> str:
    """A number for people; a dash where none was measured, or it was not finite."""
    return "–" if value is None else f"{value:.{digits}f}"


def table_text(text: str) -> str:
    """Text for a cell of a Markdown table, in one line: no markup, no links, no further cells."""
    safe = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\|`\[\]*])", r"\\\1", safe)


@contextmanager
def drawing() -> Iterator[None]:
    """Context for drawing figures in which ``$`` is literal, not mathematics."""
    with matplotlib.rc_context({"text.parse_math": False}):
        yield


def plain_ticks(axis: Axis) -> None:
    """Numbers beside a logarithmic axis without mathematical notation, see ``drawing``."""
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if isinstance(axis.get_minor_formatter(), LogFormatter):  # labels where decades are few
        axis.set_minor_formatter(LogFormatter())
