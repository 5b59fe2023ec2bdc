"""Atomic, durable files: complete or absent, even after a power failure."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace(fresh: Path, target: Path) -> None:
    """Flush a finished file or folder to disk, then rename it into place.

    Raises:
        OSError: the disk is full, or the place cannot be written.
    """
    settle(fresh)
    fresh.replace(target)
    with suppress(OSError):  # not every file system lets folders be synchronised
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def settle(path: Path) -> None:
    """Flush a file, or all files in a folder, to disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
