"""The trigger network (DHBE's PatchGeneratorPreBN): noise -> additive patches, small or faint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dhbe.game.generator import Upsampler


class TriggerNetwork(Upsampler):
    """Noise -> patches in *pixel* units; the exit is conv - BN without affine - tanh.

    Unlike the image generator's, the last BatchNorm stands before the tanh: patches live in
    (-amplitude, amplitude).

    Args:
        channels: channels of the images.
        patch_size: pixels; 3, 4, or 5 to 9 times a power of two up to 32. The image's own size
            makes changes of the whole image.
        amplitude: 1 is the paper's, enough to overwrite any pixel.
    """

    BASES = (3, 4, 5, 6, 7, 8, 9)

    def __init__(
        self,
        *,
        latent: int,
        width: int,
        channels: int,
        patch_size: int,
        amplitude: float = 1.0,
    ) -> None:
        exit = nn.Sequential(
            nn.Conv2d(width, channels, 3, padding=1),
            nn.BatchNorm2d(channels, affine=False),
            nn.Tanh(),
        )
        super().__init__(latent=latent, width=width, size=patch_size, bases=self.BASES, exit=exit)
        self.patch_size, self.amplitude = patch_size, amplitude

    def forward(self, z: Tensor) -> Tensor:
        """Noise (B, latent) -> patches (B, C, patch_size, patch_size) in pixel units."""
        patches = super().forward(z)
        return patches if self.amplitude == 1 else self.amplitude * patches


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
