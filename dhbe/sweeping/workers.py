"""A worker's share of the machine."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from filelock import FileLock, Timeout

_held: list[FileLock] = []
"""Lock of this process's slot; the kernel frees it when the process ends, however it ends."""


def take_slot(limit: int | None = None) -> int:
    """The lowest number that no other process of this user on this machine holds.

    Args:
        limit: wait for one below this.
    """
    root = Path(tempfile.gettempdir()) / f"dhbe-{os.getuid()}"
    root.mkdir(exist_ok=True)
    slot = 0
    while True:
        lock = FileLock(root / f"slot-{slot}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            slot += 1
            if limit and slot >= limit:
                time.sleep(0.5)
                slot = 0
        else:
            _held.append(lock)
            return slot


def pin(slot: int) -> None:
    """Show this process one of the GPUs that it sees: ``slot`` modulo their number."""
    import torch

    if count := torch.cuda.device_count():
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[slot % count]


def holds_slot() -> bool:
    """Whether this process has taken its slot already."""
    return bool(_held)
