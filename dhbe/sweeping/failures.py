"""Records of failed cells, those of killed processes among them."""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import socket
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from dhbe.core.errors import LostError, is_config_mistake

PLANS = ".sweeps"
"""Folder inside a results folder: plans, and a note on each job that is being computed."""


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


_jobs: list[IO[str]] = []
"""Note on the job of this process: locked while it lives; only SIGKILL leaves the file behind."""


def announce_job(config: DictConfig) -> None:
    """Write the record of failure that this job would leave if its process were killed."""
    folder = Path(config.hydra.runtime.output_dir)
    place = folder.parent / PLANS
    place.mkdir(parents=True, exist_ok=True)
    lost = LostError(f"process {os.getpid()} died while computing this cell")
    atexit.unregister(withdraw_job)
    atexit.register(withdraw_job)  # stopped by SIGTERM: not every process deletes what it opened
    file = tempfile.NamedTemporaryFile("w", dir=place, suffix=".job")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(failure_record(lost, config) | {"cell": folder.name}, file)
    file.flush()
    _jobs[:] = [file]


def record_lost_jobs(results: Path) -> None:
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
                write_json(known, content)
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


def write_json(file: Path, content: Any) -> None:
    """JSON, in one step: a reader never sees half of it."""
    fresh = file.with_name(f"{file.name}.{os.getpid()}.new")
    fresh.write_text(json.dumps(content, indent=1))
    fresh.replace(file)


def withdraw_job() -> None:
    """The job of this process has ended by itself: remove its announcement."""
    with suppress(FileNotFoundError):  # the folder was deleted
        while _jobs:
            _jobs.pop().close()
