"""What a sweep adds to its cells: a plan to look at, a share of the machine, records of failures.

``Sweep`` is a Hydra callback; it travels with each job to the process or machine that computes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dhbe.config.resolvers import register_resolvers
from dhbe.core.errors import LostError, is_config_mistake
from dhbe.core.exit_status import after_loss
from dhbe.core.machine import cells_at_once
from dhbe.sweeping.workers import _held, pin, take_slot

PLANS = ".sweeps"
"""Folder inside a results folder: plans, and a note on each job that is being computed."""
EXTRAS = {"submitit_local": "slurm"}
"""Extra that brings a launcher, where it is not called like the launcher."""


def failure_file(folder: Path) -> Path:
    """Where the failure of the cell with this result folder is recorded (JSON).

    Keys: ``overrides`` (list), ``choices`` (chosen config by group, as in ``metrics.json``),
    ``seed``, ``error`` (class name), ``message``, ``config_mistake``, ``traceback``, ``time``
    (seconds since 1970), ``host``, ``pid``. It is removed when the cell succeeds.
    """
    return folder.with_name(f".{folder.name}.failed.json")


def complete(folder: Path) -> bool:
    """Whether the cell with this result folder is finished."""
    return (folder / "metrics.json").exists()


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
    def read(cls, file: Path) -> Plan:
        """Plan from a file."""
        return cls(**json.loads(file.read_text()))

    @property
    def file(self) -> Path:
        """Where the plan is kept; the same cells under the same name meet there."""
        from dhbe.config.identity import fingerprint

        return Path(self.results) / PLANS / f"{self.name}-{fingerprint(self.cells)}.json"

    def label(self, overrides: list[str]) -> str:
        """Those overrides of a cell that not all cells have."""
        common = set.intersection(*map(set, self.cells))
        return " ".join(o for o in overrides if o not in common) or "the only cell"

    def failures(self) -> list[dict[str, Any]]:
        """Records of those cells whose last attempt failed, oldest first."""
        planned = {tuple(c) for c in self.cells}
        found = []
        for file in Path(self.results).glob(failure_file(Path("*")).name):
            name = file.name.removeprefix(".").removesuffix(".failed.json")
            if complete(file.with_name(name)):
                continue
            with suppress(FileNotFoundError):  # another sweep has just made it succeed
                record = json.loads(file.read_text())
                if tuple(record["overrides"]) in planned:
                    found.append(record)
        return sorted(found, key=lambda r: float(r["time"]))


class Sweep(Callback):
    """Callback of every run; single runs pass through it untouched.

    Args:
        workers: cells that this machine computes at once, under launchers that leave the choice
            to us; 0: as ``cells_at_once`` says.
    """

    def __init__(self, *, workers: int) -> None:
        self.workers, self.limit, self.group = workers, False, ""

    def __setstate__(self, state: dict[str, Any]) -> None:
        register_resolvers()  # arrived in a worker, which has not imported run.py
        self.__dict__.update(state)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse a launcher that is not installed; write the plan; see who shares this machine."""
        del kwargs
        launcher = config.hydra.runtime.choices["hydra/launcher"]
        self.limit = launcher == "submitit_local"  # it starts all cells at once
        for group, target in (
            ("hydra/launcher", config.hydra.launcher._target_),
            ("hydra/sweeper", config.hydra.sweeper._target_),
        ):
            if target not in Plugins.instance().class_name_to_class:
                choice = str(config.hydra.runtime.choices.get(group))
                extra = EXTRAS.get(choice, choice)
                print(
                    f'error: {group}={choice}: its plugin is not installed; pip install "dhbe'
                    f'[{extra}]" (in a checkout: pip install -e ".[{extra}]")',
                    file=sys.stderr,
                )
                sys.exit(2)
        launched.clear()
        if config.hydra.sweeper._target_.endswith(".BasicSweeper"):
            launched.append(plan := Plan.of(config))
            plan.file.parent.mkdir(parents=True, exist_ok=True)
            write(plan.file, asdict(plan))
            bury(Path(plan.results))
            self.group = plan.file.stem
        after_loss.append(lambda: [summarize(plan) for plan in launched])
        n_jobs = config.hydra.launcher.get("n_jobs")
        self.workers = cells_at_once(self.workers) if self.limit else n_jobs

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take a share of this machine, once per process: one GPU, or some of the CPU threads.

        In a sweep, note the job, so that it is not lost with its process.
        """
        del kwargs
        if self.workers and not _held:
            slot = take_slot(self.workers if self.limit else None)
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported
            pin(slot)
        if config.hydra.mode == RunMode.MULTIRUN:
            note(config)
            if self.group:  # of a sweep without +sweep=NAME
                os.environ.setdefault("WANDB_RUN_GROUP", self.group)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """In a sweep, record a failure instead of handing it on: other cells shall go on."""
        del kwargs
        record = failure_file(Path(config.hydra.runtime.output_dir))
        if job_return.status == JobStatus.COMPLETED:
            record.unlink(missing_ok=True)
        elif config.hydra.mode == RunMode.MULTIRUN:
            try:
                _ = job_return.return_value
            except Exception as error:
                write(record, failure_record(error, config))
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        with suppress(FileNotFoundError):  # somebody deleted the folder
            while _notes:
                _notes.pop().close()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """List all failures; exit status 1, or 2 if all are config mistakes."""
        del config, kwargs
        for plan in launched:
            failures = summarize(plan)
            if failures:
                sys.exit(2 if all(f["config_mistake"] for f in failures) else 1)


launched: list[Plan] = []
"""The sweep that this process launched, if it did."""


def summarize(plan: Plan) -> list[dict[str, Any]]:
    """Say on stderr which cells failed, those of killed processes among them."""
    bury(Path(plan.results))
    failures = plan.failures()
    for f in failures:
        cause = f"{f['error']}: {f['message']}"
        print(f"failed: {plan.label(f['overrides'])}\n  {cause}", file=sys.stderr)
    summary = f"{len(plan.cells)} cells, {len(failures)} failed"
    print(f"sweep {plan.name}: {summary}", file=sys.stderr)
    return failures


_notes: list[IO[str]] = []
"""Note on the job of this process: locked while it lives; only SIGKILL leaves the file behind."""


def note(config: DictConfig) -> None:
    """Write the record of failure that this job would leave if its process were killed."""
    folder = Path(config.hydra.runtime.output_dir)
    place = folder.parent / PLANS
    place.mkdir(parents=True, exist_ok=True)
    lost = LostError(f"process {os.getpid()} died while computing this cell")
    file = tempfile.NamedTemporaryFile("w", dir=place, suffix=".job")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(failure_record(lost, config) | {"cell": folder.name}, file)
    file.flush()
    _notes[:] = [file]


def bury(results: Path) -> None:
    """Turn the notes of killed processes into records of failure, where nothing newer is known."""
    for file in (results / PLANS).glob("*.job"):
        with suppress(FileNotFoundError, BlockingIOError), file.open("r+") as found:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while the process lives
            if not (text := found.read()):
                continue  # a process that has just begun
            content = json.loads(text)
            folder = results / content.pop("cell")
            known = failure_file(folder)
            newer = known.exists() and json.loads(known.read_text())["time"] > content["time"]
            if not complete(folder) and not newer:
                write(known, content)
            file.unlink()


def failure_record(error: Exception, config: DictConfig) -> dict[str, Any]:
    """Content of a failure record."""
    return {
        "overrides": list(config.hydra.overrides.task),
        "choices": {k: v for k, v in config.hydra.runtime.choices.items() if "hydra/" not in k},
        "seed": config.seed,
        "error": type(error).__name__,
        "message": str(error),
        "config_mistake": is_config_mistake(error),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def write(file: Path, content: Any) -> None:
    """JSON, in one step: a reader never sees half of it."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    fresh.write_text(json.dumps(content, indent=1))
    fresh.replace(file)
