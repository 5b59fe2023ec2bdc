"""Randomness of the game: latent vectors and patch places, seeded or scripted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

from dhbe.core.rng import derive_seed

Position = tuple[int | Tensor, int | Tensor]
"""Column and row of a patch's corner: Python integers, or tensors () on the noise's device."""


class Noise(ABC):
    """Source of the game's randomness.

    Draws per iteration, in order: for each student move a latent for images, one for patches and a
    place; for the generator move a latent for images; for the trigger move like a student move.
    Without trigger network there are only latents for images. Faint triggers add a latent of their
    own to each student move, and a move with a latent for images and one for themselves.
    """

    @abstractmethod
    def latent(self, batch_size: int, length: int) -> Tensor:
        """Latents (batch_size, length), standard normal."""

    @abstractmethod
    def place(self, free: int) -> Position:
        """(left, top) of the patch, each uniform in 0..free, one place for the whole batch."""

    def set_epoch(self, epoch: int) -> None:
        """Called when an epoch begins."""
        del epoch


class SeededNoise(Noise):
    """Noise that depends on (seed, epoch) only, so that a resumed game draws the same.

    Args:
        dtype: of the latents.
        device: of latents and places; places stay there, since reading them would make the host
            wait for a GPU.
    """

    def __init__(self, seed: int, *, device: torch.device, dtype: torch.dtype) -> None:
        self.seed, self.dtype, self.device = seed, dtype, device
        self.latents, self.places = torch.Generator(device), torch.Generator(device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.latents.manual_seed(derive_seed(self.seed, "latents", epoch))
        self.places.manual_seed(derive_seed(self.seed, "places", epoch))

    def latent(self, batch_size: int, length: int) -> Tensor:
        shape = (batch_size, length)
        return torch.randn(shape, generator=self.latents, device=self.device, dtype=self.dtype)

    def place(self, free: int) -> Position:
        left, top = torch.randint(free + 1, (2,), generator=self.places, device=self.device)
        return left, top


class ScriptedNoise(Noise):
    """Given latents and places in the order of use, for comparison with another implementation."""

    def __init__(self, latents: Iterable[Tensor], places: Iterable[tuple[int, int]]) -> None:
        self._latents, self._places = iter(latents), iter(places)

    def latent(self, batch_size: int, length: int) -> Tensor:
        z = next(self._latents)
        if z.shape != (batch_size, length):
            raise ValueError(f"scripted latent {tuple(z.shape)}: expected {(batch_size, length)}")
        return z

    def place(self, free: int) -> Position:
        left, top = next(self._places)
        if not (0 <= left <= free and 0 <= top <= free):
            raise ValueError(f"scripted place {(left, top)}: expected both in 0..{free}")
        return left, top
