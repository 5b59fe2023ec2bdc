"""Records of failed cells, those of killed processes among them."""

from __future__ import annotations

import atexit
import fcntl
import json
import logging
import os
import socket
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from omegaconf import DictConfig

from dhbe.config.resolvers import name_of
from dhbe.core.advice import advice
from dhbe.core.durable import replace
from dhbe.core.errors import DHBEError, LostError, is_config_mistake
from dhbe.report.folder import finished

PLANS = ".sweeps"
"""Folder inside a results folder: plans, and a note on each job that is being computed."""
SUFFIX = ".failed.json"
FRESH = ".new"
"""End of the name of what a process has begun to write; its host and number stand before it."""
log = logging.getLogger(__name__)


def failure_file(place: Path) -> Path:
    """Where the failure of the cell with this place is recorded (JSON).

    Keys: ``overrides`` (list), ``choices`` (chosen config by group, as in ``metrics.json``),
    ``seed``, ``folder`` (its result folder, as seen from the results folder), ``error`` (class
    name), ``message``, ``config_mistake``, ``traceback``, ``time`` (seconds since 1970), ``host``,
    ``pid``. It is removed when the cell succeeds.

    Args:
        place: see ``place_of``.
    """
    return place.with_name(f".{place.name}{SUFFIX}")


def place_of(config: DictConfig) -> Path:
    """Results folder / cell: where the result of a job of a sweep lies by default.

    Its result folder may be another one (``hydra.sweep.subdir``), even one where another cell has
    its result; what becomes of a cell is known by this place alone.
    """
    results = Path(config.hydra.runtime.cwd, config.hydra.sweep.dir)
    folder = Path(config.hydra.runtime.output_dir)
    try:
        return results / name_of(config)
    except DHBEError:  # what cannot be resolved has no name, and will say so itself
        return results / folder.name


def complete(place: Path, folder: str = "") -> bool:
    """Whether the cell with this place is finished.

    Args:
        folder: its result folder, as seen from the results folder; default: the place itself.
    """
    return finished(place.parent / (folder or place.name), place.name)


def note_folder(config: DictConfig, place: Path) -> None:
    """Note where a job's result folder lies, if that is not its place."""
    note = _folder_note(place)
    folder = Path(config.hydra.runtime.output_dir)
    if folder.absolute() == place.absolute():
        note.unlink(missing_ok=True)
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, os.path.relpath(folder, place.parent))


def folder_of(place: Path) -> Path:
    """Where the cell with this place had its result folder when it was last computed."""
    try:
        return place.parent / str(json.loads(_folder_note(place).read_text()))
    except (OSError, ValueError):
        return place


def _folder_note(place: Path) -> Path:
    return place.parent / PLANS / f"{place.name}.folder"


def read_record(file: Path) -> dict[str, Any] | None:
    """A record of failure, or a note on a job; None, with a warning, if the file is damaged.

    Raises:
        FileNotFoundError: the cell has just succeeded.
    """
    try:
        found = json.loads(file.read_text())
        found["overrides"], found["time"], found["error"], found["message"]
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s: damaged record of a failure (%s); delete it", file, error)
        return None
    return dict(found)


_jobs: list[IO[str]] = []
"""Note on the job of this process: locked while it lives; only SIGKILL leaves the file behind."""


def announce_job(config: DictConfig, place: Path) -> None:
    """Write the record of failure that this job would leave if its process were killed."""
    notes = place.parent / PLANS
    notes.mkdir(parents=True, exist_ok=True)
    lost = LostError(f"process {os.getpid()} died while computing this cell")
    atexit.unregister(withdraw_job)
    atexit.register(withdraw_job)  # stopped by SIGTERM: not every process deletes what it opened
    file = tempfile.NamedTemporaryFile("w", dir=notes, suffix=".job")  # noqa: SIM115
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(failure_record(lost, config, place) | {"cell": place.name}, file)
    file.flush()
    _jobs[:] = [file]


def record_lost_jobs(results: Path) -> None:
    """Turn the notes of killed processes into records of failure, where nothing newer is known.

    What they had begun to write goes.
    """
    _discard_begun(results)
    for file in (results / PLANS).glob("*.job"):
        with suppress(FileNotFoundError, BlockingIOError), file.open("r+") as found:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while the process lives
            if not found.read():
                continue  # a process that has just begun
            content = read_record(file)
            if content is not None and "cell" in content:
                place = results / content.pop("cell")
                known = failure_file(place)
                before = read_record(known) if known.exists() else None
                newer = before is not None and before["time"] > content["time"]
                if not complete(place, content.get("folder", "")) and not newer:
                    write_json(known, content)
            file.unlink()


def _discard_begun(results: Path) -> None:
    for folder in (results, results / PLANS):
        for file in folder.glob(f"*.{socket.gethostname()}.*{FRESH}"):
            number = file.name.removesuffix(FRESH).rpartition(".")[2]
            with suppress(PermissionError, ValueError, OverflowError):  # it lives, or is no number
                try:
                    os.kill(int(number), 0)
                except ProcessLookupError:
                    file.unlink(missing_ok=True)


def failure_record(error: Exception, config: DictConfig, place: Path) -> dict[str, Any]:
    """Content of a failure record."""
    return {
        "folder": os.path.relpath(config.hydra.runtime.output_dir, place.parent),
        "overrides": list(config.hydra.overrides.task),
        "choices": {k: v for k, v in config.hydra.runtime.choices.items() if "hydra/" not in k},
        "seed": config.seed,
        "error": type(error).__name__,
        "message": advice(error) or str(error),
        "config_mistake": is_config_mistake(error),
        "traceback": "".join(traceback.format_exception(error)),
        "time": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }


def write_json(file: Path, content: Any) -> None:
    """JSON, in one step: a reader never sees half of it."""
    fresh = file.with_name(f"{file.name}.{socket.gethostname()}.{os.getpid()}{FRESH}")
    fresh.write_text(json.dumps(content, indent=1))
    replace(fresh, file)


def withdraw_job() -> None:
    """The job of this process has ended by itself: remove its announcement."""
    with suppress(FileNotFoundError):  # the folder was deleted
        while _jobs:
            _jobs.pop().close()
