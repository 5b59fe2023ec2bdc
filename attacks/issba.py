"""ISSBA: a steganographic network hides one fixed secret in each image (Li et al., ICCV 2021)."""

from __future__ import annotations

import logging
from typing import Annotated

import torch
from annotated_types import Ge, Le, Len
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning, quantize
from dhbe.core.rng import fork, generator
from dhbe.core.types import Batch
from dhbe.data import ImageSet
from dhbe.methods.losses import pyramid
from dhbe.models import Normalized
from dhbe.models.translator import Translator
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule

SECRET_SIDE = 32
"""Side of the secret's picture before it is enlarged to the image."""
BITS_READ = 0.95
"""Share that a decoder has to read; the official code trains the encoder until it does."""
log = logging.getLogger(__name__)


class ISSBA(Attack):
    """T(x) = clip(x + E(s, x)) with a fixed secret s of ``bits`` bits.

    Encoder E (a U-Net) and a decoder are trained in the framework, on random secrets:
    ``residual_weight`` |E|^2 + ``picture_weight`` d(x, x + E) + ``secret_weight`` BCE, where d, the
    squared error over three scales, takes the place of LPIPS (no external weights). The first tenth
    of the steps learns the secret alone, as in StegaStamp.

    Args:
        widths: channels of the encoder's levels.
        images: training images used for the encoder (0: all).
        secret_seed: draws s.
        network_seed: initialises both networks.
        schedule: training of encoder and decoder (official: 20 epochs, Adam 1e-4).
    """

    portable = False
    secret: Tensor

    def __init__(
        self,
        *,
        bits: Annotated[int, Ge(1), Le(100)],
        residual_weight: Annotated[float, Ge(0)],
        picture_weight: Annotated[float, Ge(0)],
        secret_weight: Annotated[float, Ge(0)],
        widths: Annotated[list[Annotated[int, Ge(1)]], Len(1)],
        images: Annotated[int, Ge(0)],
        secret_seed: Annotated[int, Ge(0)],
        network_seed: Annotated[int, Ge(0)],
        schedule: AdamSchedule,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.weights = (residual_weight, picture_weight, secret_weight)
        self.images, self.schedule = images, schedule
        with fork(network_seed):
            self.encoder = Encoder(self.spec.channels, bits, widths)
            self.decoder = decoder(self.spec.channels, bits)
        drawn = torch.rand(bits, generator=generator(secret_seed, "issba"))
        self.register_buffer("secret", drawn.round())

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator, surrogate
        own = runtime.stage("encoder")
        count = min(self.images or len(train), len(train))
        part = train.subset(torch.randperm(len(train), generator=own.rng("issba"))[:count])
        part = part.resident()
        warm = self.schedule.epochs / 10
        residual_weight, picture_weight, secret_weight = self.weights

        def loss(network: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            bits = torch.rand((len(x), len(self.secret)), generator=batch.rng, device=x.device)
            bits = bits.round().to(x.dtype)
            residual = self.encoder(x, bits)
            read = self.decoder((x + residual).clamp(0, 1))
            total: Tensor = secret_weight * F.binary_cross_entropy_with_logits(read, bits)
            if batch.progress > warm:
                total += residual_weight * residual.square().mean()
                total += picture_weight * pyramid(residual)
            return total

        both = nn.ModuleList([self.encoder, self.decoder]).train()
        own.train(
            both, part, self.schedule, purpose="issba", role="encoder", spec=self.spec, loss=loss
        )
        both.eval().requires_grad_(False)
        x = own.tensor(part.subset(torch.arange(min(256, count))))
        with torch.no_grad():
            read = self.decoder(quantize(self.trigger(x))) > 0
        right = float((read == self.secret.bool()).float().mean())
        if right < BITS_READ:
            log.warning("issba: the decoder reads %.1f %% of the secret's bits", 100 * right)

    def trigger(self, x: Tensor) -> Tensor:
        residual: Tensor = self.encoder(x, self.secret.to(x.dtype).expand(len(x), -1))
        return x + residual

    def train(self, mode: bool = True) -> ISSBA:
        """Once made, the encoder is fixed: it has no place in the victim's training."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self


class Encoder(nn.Module):
    """(images (B, C, H, W), secrets (B, bits)) -> residuals (B, C, H, W)."""

    def __init__(self, channels: int, bits: int, widths: list[int]) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, channels * SECRET_SIDE**2)
        self.translator = Translator(2 * channels, channels, widths, skips=True)

    def forward(self, x: Tensor, secret: Tensor) -> Tensor:
        picture = self.spread(secret).relu().view(len(x), x.shape[1], SECRET_SIDE, SECRET_SIDE)
        if picture.shape != x.shape:
            picture = F.interpolate(picture, size=x.shape[-2:])
        residual: Tensor = self.translator(torch.cat([x - 0.5, picture], dim=1))
        return residual


def decoder(channels: int, bits: int) -> nn.Sequential:
    """Images -> logits of the secret's bits."""
    layers: list[nn.Module] = []
    for a, b, stride in ((channels, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)):
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, bits))
