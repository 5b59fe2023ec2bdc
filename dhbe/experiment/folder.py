"""One result folder: written beside its place, renamed when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dhbe.core.durable import settle
from dhbe.core.errors import ArtefactError, ConfigError, DHBEError
from dhbe.core.locks import exclusive
from dhbe.report.folder import read_metrics
from dhbe.training.parallel import first

METRICS = "metrics.json"
"""Its presence means that a folder is complete."""
CELL = "cell"
"""In an unfinished folder: whose it is."""


class ResultFolder:
    """A folder that appears under its name only when everything is in it.

    Args:
        path: the final place; if it exists it must be empty (Hydra creates it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.older = path.with_name(f".{path.name}.older")

    @property
    def complete(self) -> bool:
        """Whether a finished result lies there."""
        return (self.path / METRICS).is_file()

    def metrics(self, cell: str) -> dict[str, Any]:
        """The metrics of the finished result of this cell.

        Raises:
            ConfigError: the folder holds another cell's result.
            ArtefactError: it holds a damaged one.
        """
        try:
            found = read_metrics(self.path)
        except (OSError, ValueError) as error:
            raise ArtefactError(
                f"{self.path / METRICS}: damaged result ({error}); set force=true to compute it "
                f"anew, or delete {self.path}"
            ) from error
        if found.get("cell") != cell:
            raise ConfigError(
                f"hydra.run.dir={self.path}: holds the result of another config; choose another "
                "folder, or set force=true to replace it"
            )
        return found

    def open(self, cell: str) -> Path:
        """Make the working folder; one left by a killed run of the same cell is continued.

        Raises:
            DHBEError: it cannot be written.
        """
        mark = self.partial / CELL
        try:
            if self.partial.exists() and (not mark.exists() or mark.read_text() != cell):
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            mark.write_text(cell)
        except OSError as error:
            raise DHBEError(f"hydra.run.dir={self.path}: cannot be written ({error})") from error
        return self.partial

    def publish(self) -> None:
        """Rename the working folder to its final name, in place of an older result."""
        settle(self.partial)
        if self.complete:
            self.path.rename(self.older)  # a kill from here on loses neither: see ``claimed``
        self.discard_empty()
        try:
            self.partial.rename(self.path)
        except OSError as error:
            raise DHBEError(
                f"hydra.run.dir={self.path}: holds other files; choose another folder "
                f"(the result is in {self.partial})"
            ) from error
        shutil.rmtree(self.older, ignore_errors=True)

    def discard_empty(self) -> None:
        """Remove the folder that Hydra made, if nothing came into it."""
        with suppress(OSError):  # gone, or filled by another process in this very moment
            self.path.rmdir()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder's lock; another run of the same cell waits.

        Raises:
            DHBEError: the place cannot be written.
        """
        if not first():
            yield
            return
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(self.path))
            except OSError as error:
                raise DHBEError(
                    f"hydra.run.dir={self.path}: cannot be written ({error})"
                ) from error
            if self.older.exists():
                self._recover()
            self._refuse_others()
            try:
                yield
            finally:
                self._discard_unused()

    def _refuse_others(self) -> None:
        """Refuse, before anything is computed, to replace files that are not a result's.

        Raises:
            DHBEError: the folder holds others, or what is left of a result.
        """
        if not self.complete and self.path.is_dir() and any(self.path.iterdir()):
            raise DHBEError(
                f"hydra.run.dir={self.path}: holds files, but no complete result; choose another "
                "folder, or delete it"
            )

    def _discard_unused(self) -> None:
        """Remove a working folder that holds only its marker file; requires the lock."""
        with suppress(OSError):
            if [p.name for p in self.partial.iterdir()] == [CELL]:
                shutil.rmtree(self.partial)

    def _recover(self) -> None:
        """Tidy up after a process that was killed while it replaced an older result."""
        if self.complete:
            shutil.rmtree(self.older)
        else:
            self.discard_empty()
            self.older.rename(self.path)
