"""Decode every image before training; report all unreadable ones in one message."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from dhbe.core.errors import DataError
from dhbe.data.images import (
    Encoded,
    ImageSet,
    Resident,
    Streamed,
    decode,
    mode_of,
    unpack,
)
from dhbe.data.pixels import AS_USUAL, Pixels, Say
from dhbe.data.reading import Keep, all_of

CHUNK = 256
MOST_NAMED = 1000
"""Unreadable images that one message names."""


def assembled(
    encoded: Encoded,
    labels: Sequence[int],
    *,
    channels: int,
    size: int,
    stream: bool,
    groups: Tensor | None = None,
    how: Pixels = AS_USUAL,
    skipped: list[int] | None = None,
    keep: Keep = all_of,
) -> ImageSet:
    """Image set of the encoded images, decoded now or, if streamed, once as a check.

    Args:
        groups: (N,) keeps relatives together.
        skipped: takes the positions of images that cannot be read, and these are left out; without
            it they are refused.
        keep: the other images are not looked at.

    Raises:
        DataError: images that cannot be read; all are named.
    """
    targets = torch.as_tensor(labels, dtype=torch.int64)
    kept = keep(targets)
    positions: list[int] = kept.tolist()
    images = torch.empty((0 if stream else len(kept), channels, size, size), dtype=torch.uint8)
    target = images.numpy()

    def look(row: int, say: Say) -> None:
        name, blob = encoded(positions[row])
        if stream:
            unpack(name, blob, mode_of(channels, name), how, say)
        else:
            target[row] = decode(name, blob, channels, size, how, say)

    bad, notes = survey(len(positions), look)
    if bad and skipped is None:
        raise DataError(_listed(list(bad.values())))
    groups = None if groups is None else groups[kept]
    found: ImageSet = (
        Streamed(
            encoded,
            targets[kept],
            channels=channels,
            size=size,
            positions=kept,
            groups=groups,
            how=how,
        )
        if stream
        else Resident(images, targets[kept], groups)
    )
    if bad and skipped is not None:
        skipped += [positions[row] for row in bad]
        found = found.subset(torch.tensor([i for i in range(len(found)) if i not in bad]).long())
    found.notes = tuple(notes)
    return found


def survey(count: int, look: Callable[[int, Say], None]) -> tuple[dict[int, str], list[str]]:
    """Look at so many images, one thread per core (Pillow releases the interpreter lock).

    Returns:
        what is wrong, by position; what was done to how many others.
    """
    remarks: list[str] = []

    def tried(chunk: range) -> dict[int, str]:
        bad = {}
        for position in chunk:
            try:
                look(position, remarks.append)
            except DataError as error:
                bad[position] = str(error)
        return bad

    chunks = [range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bad = {i: text for found in pool.map(tried, chunks) for i, text in found.items()}
    return bad, [f"{n} of {count} images {what}" for what, n in sorted(Counter(remarks).items())]


def _listed(messages: list[str]) -> str:
    if len(messages) == 1:
        return messages[0]
    left = len(messages) - MOST_NAMED
    shown = "\n  ".join(messages[:MOST_NAMED]) + (f"\n  and {left} more" if left > 0 else "")
    return f"{len(messages)} images cannot be read:\n  {shown}"
