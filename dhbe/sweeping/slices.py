"""A sweep within a time limit: ``python -m dhbe.sweeping.slices NAME [--minutes 9] [key=value]``.

NAME is that of ``+sweep=NAME``; what is given as ``key=value`` stands in place of its values. The
cells are computed in order, in this process. Skipped are those that are finished, that failed
(``--retry`` tries them again) or held by another process. When the time is over, the cell in
progress is stopped by SIGTERM, and the next slice goes on from its last finished epoch.
``python -m dhbe.sweeping.status NAME`` shows where the sweep stands. Exit status: 0 all cells are
done, 3 some remain, 1 none remains but some failed, 2 the sweep cannot be composed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode
from omegaconf import open_dict, read_write

from dhbe.config.resolvers import name_of, register_resolvers
from dhbe.core.exit_status import guarded
from dhbe.core.paths import CONF
from dhbe.sweeping.callback import Sweep
from dhbe.sweeping.failures import record_lost_jobs, write_json
from dhbe.sweeping.plan import Plan, summarize
from dhbe.sweeping.status import Names, state

REMAINS = 3
"""Exit status while there are cells left."""
GRACE = 120.0
"""Seconds after the end of a slice before SIGKILL follows SIGTERM."""


def planned(name: str, overrides: list[str], *, retry: bool) -> Plan:
    """The plan of the sweep, begun now or in an earlier slice.

    Args:
        retry: count it as begun now: earlier failures are tried again.
    """
    given = [f"+sweep={name}", *overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        plan = Plan.of(hydra.compose_config("config", given, RunMode.MULTIRUN))
    last = [tuple({o.split("=")[0]: o for o in c}.values()) for c in plan.cells]
    plan = replace(plan, cells=[list(c) for c in dict.fromkeys(last)])
    if plan.file.exists() and not retry and (before := Plan.read(plan.file)):
        plan = replace(plan, started=before.started)
    plan.file.parent.mkdir(parents=True, exist_ok=True)
    write_json(plan.file, asdict(plan))
    return plan


def work(plan: Plan, names: Names, *, weights: bool) -> None:
    """Compute, in order, the cells that are neither finished nor held by another process."""
    for i, overrides in enumerate(plan.cells):
        if i == len(names.found):
            names.more(0)
        if state(Path(plan.results) / names.found[i], plan.started) in ("begun", "waiting"):
            print(f"cell {i + 1}: {plan.label(overrides)}", flush=True)
            compute(overrides, weights=weights)


def compute(overrides: list[str], *, weights: bool) -> None:
    """One cell, as a job of a multirun: its failure becomes a record.

    Args:
        weights: keep the purified network, by far the largest file of a result.
    """
    from dhbe.experiment.pipeline import run

    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides, return_hydra_config=True)
    folder = Path(config.paths.results).absolute() / name_of(config)
    with read_write(config.hydra), open_dict(config.hydra):
        config.hydra.runtime.output_dir = str(folder)
        config.hydra.mode = RunMode.MULTIRUN
    callback, job = Sweep(workers=0), JobReturn()
    callback.on_job_start(config)
    try:
        job.return_value = run(config, folder, config.hydra.runtime.choices)
        job.status = JobStatus.COMPLETED
    except Exception as error:
        job.return_value, job.status = error, JobStatus.FAILED
    callback.on_job_end(config, job)
    if not weights:
        (folder / "purified.safetensors").unlink(missing_ok=True)


def end_after(seconds: float) -> None:
    """SIGTERM to this process after so long, and SIGKILL if that does not help."""
    for after, number in ((seconds, signal.SIGTERM), (seconds + GRACE, signal.SIGKILL)):
        timer = threading.Timer(after, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


def main() -> None:
    """Command line."""
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m dhbe.sweeping.slices", description=__doc__)
    parser.add_argument("name", help="of the sweep")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--minutes", type=float, default=9.0, help="0: only say what remains")
    parser.add_argument("--retry", action="store_true", help="try failed cells again")
    parser.add_argument("--drop-weights", action="store_true", help="keep no purified network")
    options = parser.parse_intermixed_args()
    register_resolvers()
    plan = planned(options.name, options.overrides, retry=options.retry)
    names = Names(plan)
    record_lost_jobs(Path(plan.results))
    if options.minutes:
        end_after(60 * options.minutes - (time.monotonic() - begun))
        with suppress(SystemExit):
            work(plan, names, weights=not options.drop_weights)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come between two cells
    else:
        names.more(float("inf"))
    failed = len(summarize(plan))
    done = [state(Path(plan.results) / n) for n in names.found].count("done")
    remain = len(plan.cells) - done - failed
    print(f"{plan.name}: {done} of {len(plan.cells)} cells done, {failed} failed, {remain} remain")
    sys.exit(REMAINS if remain else min(failed, 1))


if __name__ == "__main__":
    guarded(main)
