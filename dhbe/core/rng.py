"""Random streams: every draw of a run comes from a generator derived from (seed, purpose)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *purpose: object) -> int:
    """63-bit seed that depends on the run's seed and on what it is used for.

    Hashing keeps the streams independent: drawing more in one place never shifts another.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
    """Fresh generator on ``device`` for this (seed, purpose)."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *purpose))


@contextmanager
def fork(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator inside the block (network initialisation needs it)."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
