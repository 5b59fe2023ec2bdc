"""File locks between workers, on one machine and on a shared file system."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

LEASE = 300.0
"""Seconds without a sign of life after which the claim of a process on another machine lapses."""
PATIENCE = 2.0
"""Seconds of waiting without a word."""
log = logging.getLogger(__name__)


@contextmanager
def exclusive(path: Path, lease: float = LEASE) -> Iterator[None]:
    """Hold ``path`` for the block; others wait. A holder that dies frees it.

    The kernel's lock is exact among the processes of a machine. A network file system may keep it
    to that machine (NFS mounted with ``nolock``), so a claim goes with it: a file that can be
    created only once, renewed every third of ``lease`` seconds.

    Raises:
        OSError: the folder cannot be written.
    """
    lock, claim = _files(path)
    with ExitStack() as stack:
        for one in (FileLock(lock), SoftFileLease(claim, lease_duration=lease)):
            try:
                one.acquire(timeout=PATIENCE)
            except Timeout:
                log.warning("%s: held by another process; waiting", path)
                one.acquire()
            stack.callback(one.release)
        yield


def held(path: Path) -> bool:
    """Whether a live process holds ``path``; on another machine, as far as its claim tells."""
    lock, claim = _files(path)
    if not lock.exists():
        return False
    try:
        with FileLock(lock).acquire(blocking=False):
            return claim.exists() and _renewed(claim)
    except Timeout:
        return True


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.claim")


def _renewed(claim: Path) -> bool:
    try:
        with SoftFileLease(claim, lease_duration=LEASE).acquire(blocking=False):
            return False  # of a process of this machine that died
    except Timeout:
        with suppress(FileNotFoundError):  # let go in this moment
            return time.time() - claim.stat().st_mtime < LEASE
        return False
