"""The state of a training after each epoch: sealed, on the disk, and checked before it is used."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from dhbe.core.durable import replace
from dhbe.training.recorder import Stopwatch

LAST, FRESH, FORMER = "last.ckpt", "last.new", "former.ckpt"
"""States of the last finished epoch, the same before it has its name, and the one before."""
MARK = b"sha256:"
SEAL = len(MARK) + 64
"""Bytes of the seal, which is the comment of the zip file that torch writes."""
log = logging.getLogger(__name__)


class LastEpoch(Checkpoint):
    """Saves the state of the last finished epoch, in one step, after the recorder has its row.

    Lightning's own ModelCheckpoint with ``save_top_k=0`` writes nothing before training ends.

    Args:
        folder: of the training.
        writes: of several processes only one does.
    """

    def __init__(self, folder: Path, stopwatch: Stopwatch | None, *, writes: bool = True) -> None:
        self.folder, self.stopwatch, self.writes = folder, stopwatch, writes

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save; where the folder is deleted at this very moment, the next epoch saves anew."""
        if not self.writes:
            return
        try:
            self._save(trainer)
        except FileNotFoundError:
            log.warning(
                "%s: deleted while the state of epoch %d was saved; the training goes on, and the "
                "state of the next epoch is saved",
                self.folder,
                trainer.current_epoch,
            )

    def _save(self, trainer: pl.Trainer) -> None:
        """Write beside the file, then rename: a kill never leaves half a checkpoint."""
        last, fresh = self.folder / LAST, self.folder / FRESH
        trainer.save_checkpoint(fresh)
        seal(fresh)
        with suppress(FileNotFoundError):  # the first epoch, or a folder deleted meanwhile
            last.replace(self.folder / FORMER)
        replace(fresh, last)
        if self.stopwatch is not None:
            self.stopwatch.save()


def seal(file: Path) -> None:
    """Append the SHA-256 of a file of ``torch.save``, as the comment of that zip file."""
    with file.open("rb+") as content:
        content.seek(-2, os.SEEK_END)  # the length of the comment, so far 0
        content.write(SEAL.to_bytes(2, "little"))
        content.seek(0)
        found = hashlib.sha256(content.read()).hexdigest()
        content.write(MARK + found.encode())


def sound(file: Path) -> bool:
    """Whether a file is as ``seal`` left it.

    Raises:
        FileNotFoundError: there is none.
    """
    content = file.read_bytes()
    body, end = content[:-SEAL], content[-SEAL:]
    return end == MARK + hashlib.sha256(body).hexdigest().encode()


def newest(folder: Path) -> Path | None:
    """The newest sound state in the folder of a training; damaged ones are set aside.

    A flipped bit, a truncated file (a disk that was full, a power cut) or another program's file
    would otherwise end every further attempt, or be trained on.
    """
    for name in (LAST, FRESH, FORMER):
        file = folder / name
        with suppress(FileNotFoundError):
            if sound(file):
                return file
            if name == FRESH:  # of a process killed while it wrote
                continue
            aside = file.with_suffix(".damaged")
            file.replace(aside)
            log.warning(
                "%s: damaged checkpoint (its SHA-256 differs), set aside as %s; the training goes "
                "on from the epoch before if that is sound, else it begins anew",
                file,
                aside.name,
            )
    return None
