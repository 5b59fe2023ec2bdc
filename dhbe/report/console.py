"""The short table at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dhbe.report.folder import rows


def show(metrics: dict[str, Any], folder: Path, *, reused: bool = False) -> None:
    """Print before/after rates, times and the folder's path."""
    m = metrics
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
    console = Console()
    console.print(table)
    for note in m["notes"]:
        warns = note.startswith("WARNING")
        console.print(
            escape(note) if warns else f"note: {escape(note)}", style="bold red" if warns else None
        )
    state = "already there; force=true computes it anew" if reused else "report.html inside"
    console.print(f"result: {escape(str(folder))} ({state})", soft_wrap=True)
