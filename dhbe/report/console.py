"""The short table at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dhbe.report.findings import findings
from dhbe.report.folder import ROLES, rows
from dhbe.report.legend import class_names


def show(metrics: dict[str, Any], folder: Path, *, reused: bool = False) -> None:
    """Print what was found in a checkpoint, before/after rates, times and where the results are."""
    m = metrics
    console = Console()
    config = folder / "config.yaml"
    known = m.get("evidence") and config.exists()
    names = class_names(m["data"], config.read_text()) if known else []
    for finding in findings(m, names):
        style = "bold red" if finding.alarming else None
        console.print(f"{finding.title}: {escape(finding.text)}", style=style)
    title = f"{m['attack']} on {m['data']} / {m['model']}, {m['defense']}"
    title += f", scale {m['scale']}, seed {m['seed']}"
    if m["selection"] == "oracle":
        title += ", selected on the test set (oracle)"
    table = Table(title=escape(title))
    table.add_column("")
    table.add_column("victim", justify="right")
    table.add_column("purified", justify="right")
    for row in rows(m):
        table.add_row(row.label, row.before, row.after)
    seconds = m["seconds"]
    table.add_row(
        "seconds",
        f"{seconds['victim']:.1f}{' (cached)' if m['cached_victim'] else ''}",
        f"{seconds['defense']:.1f}",
    )
    measured = any(m[role][name] is not None for role in ROLES for name in m[role])
    if measured or not m.get("evidence"):  # else a table of dashes
        console.print(table)
    else:
        console.print(f"{m['defense']} on {m['model']}: {seconds['defense']:.0f} seconds")
    for note in m["notes"]:
        warns = note.startswith("WARNING")
        console.print(
            escape(note) if warns else f"note: {escape(note)}", style="bold red" if warns else None
        )
    for file in folder.glob("*-purified*"):  # in the format of the given file
        console.print(f"purified: {escape(str(file))}", soft_wrap=True)
    state = "already there; force=true computes it anew" if reused else "report.html inside"
    console.print(f"result: {escape(str(folder))} ({state})", soft_wrap=True)
