"""Progress of a sweep: ``python -m dhbe.sweeping.status [NAME|DIR] [--once]``.

NAME is that of ``+sweep=NAME`` (results in ``--results``), DIR a results folder; of several
launches the newest is shown. It only reads files and tests locks, and ends when no
cell is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dhbe.config.resolvers import name_of, register_resolvers
from dhbe.core.locks import held
from dhbe.core.paths import CONF
from dhbe.report.folder import finished
from dhbe.sweeping.failures import PLANS, failure_file, folder_of, read_record, write_json
from dhbe.sweeping.plan import Plan

STATES = {"done": "green", "running": "cyan", "failed": "red", "begun": "yellow", "waiting": "dim"}
"""``begun``: a process died there; the next one continues it."""
SHOWN = 12
"""Running and failed cells listed at most."""


def newest(target: str, results: Path) -> Plan:
    """The plan of the last launch of a sweep, by name or results folder.

    Raises:
        FileNotFoundError: none was ever launched there.
    """
    folder, name = (Path(target), "*") if Path(target).is_dir() else (results, target)
    files = (folder / PLANS).glob(f"{name}-*[0-9a-f].json")
    plans = [plan for plan in map(Plan.read, files) if plan is not None]
    if not plans:
        raise FileNotFoundError(
            f"{target}: neither a results folder nor a sweep launched into {folder}; "
            "see sweeps/*.yaml, and --results"
        )
    return max(plans, key=lambda p: p.started)


class Names:
    """Result folders of the cells of a plan; composing takes 0.1 s each, so they are kept."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.cache = plan, plan.file.with_suffix(".cells")
        self.found: list[str] = []
        if self.cache.exists():  # configs or data may have changed since an older launch
            with suppress(OSError, ValueError, KeyError):  # damaged: they are composed again
                known = json.loads(self.cache.read_text())
                if isinstance(known, dict) and known["started"] == plan.started:
                    self.found = list(known["names"])

    def more(self, seconds: float) -> list[str]:
        """The names known after looking for ``seconds``, in the order of the plan."""
        rest = self.plan.cells[len(self.found) :]
        end = time.monotonic() + seconds
        register_resolvers()
        with initialize_config_dir(str(CONF), version_base="1.3"):
            for overrides in rest:
                config = compose("config", [*overrides, f"paths.data='{self.plan.data}'"])
                self.found.append(name_of(config))
                if time.monotonic() > end:
                    break
        if rest:
            write_json(self.cache, {"started": self.plan.started, "names": self.found})
        return self.found


def state(place: Path, since: float = 0.0) -> str:
    """One of ``STATES``, of the cell with this place, see ``dhbe.sweeping.failures.place_of``.

    Args:
        since: failures before this time are those of an older launch, and will be tried again.
    """
    folder = folder_of(place)
    if finished(folder, place.name):
        return "done"
    if held(folder):
        return "running"
    with suppress(FileNotFoundError):
        record = read_record(failure_file(place))
        if record is None or record["time"] >= since:
            return "failed"
    return "begun" if folder.with_name(f".{folder.name}.partial").exists() else "waiting"


def left(plan: Plan, places: list[Path], states: list[str]) -> timedelta | None:
    """Time until the last cell ends, at the pace since the launch; None: nothing to go by."""
    done = [folder_of(p) for p, s in zip(places, states, strict=True) if s == "done"]
    ends = [folder / "metrics.json" for folder in done]
    fresh = sum(e.stat().st_mtime > plan.started for e in ends)
    todo = len(plan.cells) - len(ends) - states.count("failed")
    if not todo:
        return timedelta()
    if not fresh:
        return None
    return timedelta(seconds=round(max(0.0, time.time() - plan.started) / fresh * todo))


def view(plan: Plan, names: list[str]) -> tuple[Table, bool]:
    """What the terminal shows, and whether nothing is left to wait for."""
    places = [Path(plan.results) / n for n in names]
    states = [state(p, plan.started) for p in places]
    count, total = Counter(states), len(plan.cells)
    rest = left(plan, places, states)
    head = f"{plan.name} in {plan.results}: {count['done']} of {total} cells done, "
    head += f"time left {'unknown' if rest is None else rest}"
    if len(names) < total:
        head += f" ({total - len(names)} cells not looked at yet)"
    table = Table.grid()
    table.add_row(head)
    table.add_row(ProgressBar(total=total, completed=count["done"], width=60))
    table.add_row(Text("  ").join(Text(f"{s} {count[s]}", style=c) for s, c in STATES.items()))
    for wanted in ("running", "failed"):
        for i in [i for i, s in enumerate(states) if s == wanted][:SHOWN]:
            line = Text(f"{wanted}: {plan.label(plan.cells[i])}", style=STATES[wanted])
            table.add_row(line)
            if wanted == "failed":
                table.add_row(f"  {cause(failure_file(places[i]))}")
    return table, count["done"] + count["failed"] == total


def cause(file: Path) -> str:
    """What a record of failure tells, in one line."""
    with suppress(FileNotFoundError):
        if (record := read_record(file)) is None:
            return f"{file}: damaged record of a failure; delete it"
        return f"{record['error']}: {record['message']} ({record.get('host')})"
    return "tried again in this moment"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.sweeping.status", description=__doc__)
    parser.add_argument("target", nargs="?", default="*", help="name of a sweep, or results folder")
    parser.add_argument("--results", type=Path, default=Path("outputs/results"))
    parser.add_argument("--once", action="store_true", help="print and end")
    options = parser.parse_args()
    try:
        plan = newest(options.target, options.results)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    names = Names(plan)
    if options.once:
        Console().print(view(plan, names.more(float("inf")))[0])
        return
    with suppress(KeyboardInterrupt), Live() as live:
        over = False
        while not over:
            table, over = view(plan, names.more(1.0))
            live.update(table)
            time.sleep(1.0)


if __name__ == "__main__":
    main()
