"""Atomic, durable files: complete or absent, even after a power failure."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """For libraries in other languages, whose exceptions do not name the file.

    Raises:
        OSError: what the system said, with the file's name.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or isinstance(error, OSError):
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(file)) from error


def settle(path: Path) -> None:
    """Flush a file, or all files in a folder, to disk.

    Raises:
        OSError: the disk is full, or fails.
    """
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())
