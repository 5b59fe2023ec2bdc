"""The Hydra callback of every run: it plans a sweep, shares the machine, records failures.

It travels with each job to the process or machine that computes it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from dhbe.config.resolvers import register_resolvers
from dhbe.core.exit_status import fail
from dhbe.core.machine import cells_at_once
from dhbe.sweeping.failures import (
    announce_job,
    failure_file,
    failure_record,
    note_folder,
    place_of,
    record_lost_jobs,
    withdraw_job,
    write_json,
)
from dhbe.sweeping.plan import Plan, launched, summarize
from dhbe.sweeping.workers import holds_slot, pin, take_slot

EXTRAS = {"submitit_local": "slurm"}
"""Extra that brings a launcher, where it is not called like the launcher."""


def insistent(method: Callable[..., None]) -> Callable[..., None]:
    """Decorator: a failing callback ends the command; Hydra would only warn."""

    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            fail(error)

    return called


class Sweep(Callback):
    """Callback of every run; single runs pass through it untouched.

    Args:
        workers: cells that this machine computes at once, under launchers that leave the choice
            to us; 0: as ``cells_at_once`` says.
    """

    def __init__(self, *, workers: int) -> None:
        self.workers, self.limit, self.group = workers, False, ""
        self.place: Path | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        register_resolvers()  # arrived in a worker, which has not imported run.py
        self.__dict__.update(state)

    @insistent
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
            write_json(plan.file, asdict(plan))
            record_lost_jobs(Path(plan.results))
            self.group = plan.file.stem
        n_jobs = config.hydra.launcher.get("n_jobs")
        self.workers = cells_at_once(self.workers) if self.limit else n_jobs

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Take a share of this machine, once per process: one GPU, or some of the CPU threads.

        In a sweep, note the job, so that it is not lost with its process. With
        ``hydra.job.chdir=true`` go back: relative paths mean what they mean to the user, or a
        victim of before would not be found.
        """
        del kwargs
        if config.hydra.job.chdir:
            os.chdir(config.hydra.runtime.cwd)
        if self.workers and not holds_slot():
            slot = take_slot(self.workers if self.limit else None)
            threads = max(1, (os.cpu_count() or 1) // self.workers)
            os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # before torch is imported
            pin(slot)
        if config.hydra.mode == RunMode.MULTIRUN:
            self.place = place_of(config)
            note_folder(config, self.place)
            announce_job(config, self.place)
            if self.group:  # of a sweep without +sweep=NAME
                os.environ.setdefault("WANDB_RUN_GROUP", self.group)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """In a sweep, record a failure instead of handing it on: other cells shall go on."""
        del kwargs
        place = self.place or Path(config.hydra.runtime.output_dir)
        record = failure_file(place)
        if job_return.status == JobStatus.COMPLETED:
            record.unlink(missing_ok=True)
        elif config.hydra.mode == RunMode.MULTIRUN:
            try:
                _ = job_return.return_value
            except Exception as error:
                write_json(record, failure_record(error, config, place))
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        withdraw_job()

    @insistent
    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """List all failures; exit status 1, or 2 if all are config mistakes."""
        del config, kwargs
        for plan in launched:
            failures = summarize(plan)
            if failures:
                sys.exit(2 if all(f["config_mistake"] for f in failures) else 1)
