"""File access: opened once, and every byte read is covered by the file's hash."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

from dhbe.checkpoint.pickles import Refused

CHUNK = 2**18
CACHED = 16
"""Chunks kept in memory."""


class Source(io.RawIOBase):
    """A file whose changes are detected.

    Each chunk is hashed when it is first read. A later read, be it to hash
    the whole file, gets the same bytes or an error.

    Raises:
        Refused: the file has changed since it was opened.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self.size = os.fstat(self._fd).st_size
        self._position = 0
        self._seals: dict[int, bytes] = {}
        self._cache: dict[int, bytes] = {}

    def _chunk(self, number: int) -> bytes:
        if number in self._cache:
            return self._cache[number]
        os.lseek(self._fd, number * CHUNK, os.SEEK_SET)
        wanted = min(CHUNK, self.size - number * CHUNK)
        raw = b""
        while len(raw) < wanted and (part := os.read(self._fd, wanted - len(raw))):
            raw += part
        seal = hashlib.blake2b(raw, digest_size=16).digest()
        if len(raw) != wanted or self._seals.setdefault(number, seal) != seal:
            raise Refused("changed while it was read; start again")
        if len(self._cache) >= CACHED:
            del self._cache[next(iter(self._cache))]
        self._cache[number] = raw
        return raw

    def span(self, start: int, length: int) -> bytearray:
        """``length`` bytes from ``start``.

        Raises:
            Refused: the file ends before.
        """
        if not 0 <= start <= start + length <= self.size:
            raise Refused("the file ends too early")
        found = bytearray()
        while len(found) < length:
            at = start + len(found)
            chunk = self._chunk(at // CHUNK)
            found += memoryview(chunk)[at % CHUNK : at % CHUNK + length - len(found)]
        return found

    def sha256(self) -> str:
        """Of the whole file."""
        found = hashlib.sha256()
        for start in range(0, self.size, CHUNK):
            found.update(self._chunk(start // CHUNK))
        return found.hexdigest()

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        """As of files, for ``zipfile``."""
        count = max(0, min(len(buffer), self.size - self._position))
        buffer[:count] = self.span(self._position, count)
        self._position += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of files."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError("a position before the start")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        """As of files."""
        return self._position

    def readable(self) -> bool:
        """As of files."""
        return True

    def seekable(self) -> bool:
        """As of files."""
        return True

    def close(self) -> None:
        """Close the file; also done when nobody refers to it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        super().close()
