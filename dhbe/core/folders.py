"""List folders: links are followed, files left by operating systems are skipped."""

from __future__ import annotations

import errno
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

LEFT_BEHIND = {
    *("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "lost+found", "@eaDir", "#recycle"),
    *("$RECYCLE.BIN", "System Volume Information"),
}
"""Names, besides those that start with a dot, that a system, a file manager or an archive makes."""


def left_behind(name: str) -> bool:
    """Whether a name is one that operating systems leave behind (``.DS_Store`` and the like)."""
    return name.startswith(".") or name in LEFT_BEHIND


def matching(folder: Path, pattern: str) -> list[Path]:
    """What this name or pattern, relative to a folder or absolute, stands for, in name order."""
    if not pattern:
        return []
    literal = os.path.join(folder, os.path.expanduser(pattern))
    if os.path.exists(literal):
        return [Path(literal)]
    whole = os.path.join(glob.escape(str(folder)), os.path.expanduser(pattern))
    return sorted(Path(found) for found in glob.glob(whole, recursive=True))


def below(top: Path, failed: Callable[[OSError], None], *, hidden: bool = False) -> Iterator[Path]:
    """Files, broken links and folders below a folder, in name order, a folder before what it holds.

    Linked folders are entered, each folder once.

    Args:
        failed: told of each folder that cannot be read, or leads back to one that contains it;
            what it does not raise leaves that folder out.
        hidden: see what is left behind as well.
    """
    seen: set[str] = set()
    real_top = os.path.realpath(top)
    above = {real_top, *map(str, Path(real_top).parents)}

    def entered(folder: Path, above: set[str]) -> Iterator[Path]:
        try:
            entries = sorted(folder.iterdir())
        except OSError as error:
            failed(error)
            return
        for entry in entries:
            if left_behind(entry.name) and not hidden:
                continue
            yield entry
            if not os.path.isdir(entry):
                continue
            real = os.path.realpath(entry)
            if real in above:
                failed(OSError(errno.ELOOP, "leads back to a folder that contains it", str(entry)))
            elif real not in seen:
                seen.add(real)
                yield from entered(entry, above | {real})

    return entered(top, above)
