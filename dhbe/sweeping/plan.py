"""Plan of a sweep: its cells and their outcomes."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from dhbe.config.identity import fingerprint
from dhbe.sweeping.failures import (
    PLANS,
    SUFFIX,
    complete,
    failure_file,
    read_record,
    record_lost_jobs,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells that a sweep is to compute.

    Attributes:
        name: of the ``+sweep=`` file, or ``sweep``.
        started: seconds since 1970.
        results: folder of the result folders.
        data: ``paths.data`` of the launch, which is part of what a cell reads.
        cells: overrides of each cell, Hydra's own left out.
    """

    name: str
    started: float
    results: str
    data: str
    cells: list[list[str]]

    @classmethod
    def of(cls, config: DictConfig) -> Plan:
        """Plan of the sweep that Hydra is about to start with this config."""
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        params = config.hydra.sweeper.get("params") or {}
        given = [f"{k}={v}" for k, v in params.items()] + list(config.hydra.overrides.task)
        (cells,) = BasicSweeper.split_arguments(parser.parse_overrides(given), None)
        return cls(
            name=config.hydra.runtime.choices.get("sweep") or "sweep",
            started=time.time(),
            results=str(Path(config.hydra.sweep.dir).absolute()),
            data=str(config.paths.data),
            cells=[[o for o in c if not o.lstrip("+~").startswith("hydra.")] for c in cells],
        )

    @classmethod
    def read(cls, file: Path) -> Plan | None:
        """Plan from a file; None, with a warning, if it is damaged."""
        try:
            return cls(**json.loads(file.read_text()))
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: damaged plan of a sweep (%s); launch it again", file, error)
            return None

    @property
    def file(self) -> Path:
        """Where the plan is kept; the same cells under the same name meet there."""
        return Path(self.results) / PLANS / f"{self.name}-{fingerprint(self.cells)}.json"

    def label(self, overrides: list[str]) -> str:
        """Those overrides of a cell that not all cells have."""
        common = set.intersection(*map(set, self.cells))
        text = " ".join(o for o in overrides if o not in common)
        return text or ("the only cell" if overrides else "an unknown cell")

    def failures(self) -> list[dict[str, Any]]:
        """Records of those cells whose last attempt failed, oldest first."""
        planned = {tuple(c) for c in self.cells}
        found = []
        for file in Path(self.results).glob(failure_file(Path("*")).name):
            place = file.with_name(file.name.removeprefix(".").removesuffix(SUFFIX))
            with suppress(FileNotFoundError):  # another sweep has just made it succeed
                record = read_record(file)
                if record is None and not complete(place):  # it may be one of ours
                    found.append(unreadable(file))
                elif record is not None and not complete(place, record.get("folder", "")):
                    found += [record] * (tuple(record["overrides"]) in planned)
        return sorted(found, key=lambda r: float(r["time"]))


def unreadable(file: Path) -> dict[str, Any]:
    """What stands for a record that cannot be read."""
    message = f"{file}: damaged record of a failure; delete it"
    known = {"error": "ArtefactError", "message": message, "config_mistake": False}
    return known | {"overrides": [], "time": 0.0}


launched: list[Plan] = []
"""The sweep that this process launched, if it did."""


def summarize(plan: Plan) -> list[dict[str, Any]]:
    """Say on stderr which cells failed, those of killed processes among them."""
    record_lost_jobs(Path(plan.results))
    failures = plan.failures()
    for f in failures:
        cause = f"{f['error']}: {f['message']}"
        print(f"failed: {plan.label(f['overrides'])}\n  {cause}", file=sys.stderr)
    summary = f"{len(plan.cells)} cells, {len(failures)} failed"
    print(f"sweep {plan.name}: {summary}", file=sys.stderr)
    return failures
