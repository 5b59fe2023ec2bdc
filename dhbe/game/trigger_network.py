"""The attackers: DHBE's trigger network (PatchGeneratorPreBN) for patches, and faint triggers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from dhbe.game.generator import Upsampler
from dhbe.game.noise import Position

Latents = Callable[[int], Tensor]
"""Length -> standard normal latents (B, length) for a batch."""
Positions = Callable[[int], Position]
"""Free pixels -> the place of a patch."""


class Attacker(Protocol):
    """A player that changes images so that the student's logits move."""

    def perturb(self, x_norm: Tensor, std: Tensor, latents: Latents, place: Positions) -> Tensor:
        """Changed images (B, C, H, W), normalised by deviations ``std`` (1, C, 1, 1)."""


class TriggerNetwork(Upsampler):
    """Noise -> patches in *pixel* units; the exit is conv - BN without affine - tanh.

    Unlike the image generator's, the last BatchNorm stands before the tanh: patches live in
    (-1, 1), enough to overwrite any pixel.

    Args:
        channels: channels of the images.
        patch_size: pixels; 3, 4, or 5 to 9 times a power of two up to 32.
    """

    BASES = (3, 4, 5, 6, 7, 8, 9)

    def __init__(self, *, latent: int, width: int, channels: int, patch_size: int) -> None:
        exit = nn.Sequential(
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
            nn.Tanh(),
        )
        super().__init__(latent=latent, width=width, size=patch_size, bases=self.BASES, exit=exit)
        self.patch_size = patch_size

    def perturb(self, x_norm: Tensor, std: Tensor, latents: Latents, place: Positions) -> Tensor:
        """Normalised images (B, C, H, W) with fresh patches at a fresh place."""
        patches = self(latents(self.latent))
        return add_patches(x_norm, patches, std, *place(x_norm.shape[-1] - self.patch_size))


class FaintTriggers(nn.Module):
    """Changes of the whole image within (-amplitude, amplitude), in pixel units. Ours.

    Every other image meets what a trigger network draws, which is smooth and differs from image to
    image; the rest meet a few universal changes whose pixels are free of each other, as those of a
    noise trigger are.

    Args:
        count: of the universal changes; images take turns.
        latent, width: of the network.
        image_size: pixels, 3, 4, or 5 to 9 times a power of two up to 32.
        amplitude: of 1, the range of pixels.
    """

    def __init__(
        self,
        *,
        count: int,
        latent: int,
        width: int,
        channels: int,
        image_size: int,
        amplitude: float,
    ) -> None:
        super().__init__()
        self.network = TriggerNetwork(
            latent=latent, width=width, channels=channels, patch_size=image_size
        )
        self.free = nn.Parameter(0.1 * torch.randn(count, channels, image_size, image_size))
        self.amplitude = amplitude

    def forward(self, z: Tensor) -> Tensor:
        """Noise (B, latent) -> changes (B, C, H, W), those at even places drawn from it."""
        rows = torch.arange(len(z), device=z.device)
        turns = torch.arange(len(z) // 2, device=z.device) % len(self.free)
        changes = torch.cat([self.network(z[::2]), torch.tanh(self.free)[turns]])
        places = torch.cat([rows[::2], rows[1::2]])  # the same for each part of a divided batch
        return self.amplitude * changes[places.argsort()]

    def perturb(self, x_norm: Tensor, std: Tensor, latents: Latents, place: Positions) -> Tensor:
        """Normalised images (B, C, H, W) with a change added to each, not clipped."""
        del place
        changed: Tensor = x_norm + self(latents(self.network.latent)) / std
        return changed


def add_patches(
    x_norm: Tensor, patches: Tensor, std: Tensor, left: int | Tensor, top: int | Tensor
) -> Tensor:
    """Normalised images with patches added at one place, not clipped.

    Equals ``N(N^-1(x) + Pad(patches))`` of the paper, since normalisation is affine: a pixel offset
    d becomes d / std. All shapes are the same whatever the place, and nothing is read from a GPU.

    Args:
        x_norm: (B, C, H, W) in normalised space.
        patches: (B, C, p, p) in pixel units.
        std: per-channel deviation (1, C, 1, 1).
        left, top: column and row of the patch's corner; as tensors () they stay on their device.
    """
    span = torch.arange(patches.shape[-1], device=x_norm.device)
    rows, columns = (top + span)[:, None], left + span
    patched = x_norm.clone()
    patched[:, :, rows, columns] += patches / std
    return patched
