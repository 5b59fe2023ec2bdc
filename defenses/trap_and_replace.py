"""Trap and Replace: a head that traps the backdoor is replaced (Wang et al., NeurIPS 2022)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from dhbe.contracts.defense import Defense
from dhbe.core.rng import fork
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.losses import total_variation_squared
from dhbe.models import Normalized
from dhbe.models.hooks import Dropout, capture, executed_after, inserted
from dhbe.models.normalized import fresh
from dhbe.models.shortcuts import blocks
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule, Player


class TrapAndReplace(Defense):
    """Train anew on the poisoned set in two stages (arXiv 2210.06428).

    1. Bait and trap: the network is split into stem and light head; CE + picture_weight
       MSE(decoder(stem(x)), x) + smooth_weight TV(decoder(stem(x))). The stem must keep the
       picture, so the shortcut from trigger to label settles in the head.
    2. Replace: with the stem frozen, BatchNorm included, a new head learns the clean holdout with
       CutMix, label smoothing and dropout, behind its blocks and between their convolutions.

    Args:
        head_blocks: residual blocks in the head, besides the classifier (WRN and ResNet-18: 1).
        dropout: in stage 2.
        schedule, head_schedule: of the two stages.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9, poisoned=True)

    def __init__(
        self,
        *,
        head_blocks: Annotated[int, Ge(0)],
        picture_weight: Annotated[float, Ge(0)],
        smooth_weight: Annotated[float, Ge(0)],
        dropout: Annotated[float, Ge(0), Lt(1)],
        label_smoothing: Annotated[float, Ge(0), Lt(1)],
        schedule: AdamSchedule,
        head_schedule: AdamSchedule,
    ) -> None:
        self.head_blocks, self.dropout = head_blocks, dropout
        self.picture_weight, self.smooth_weight = picture_weight, smooth_weight
        self.label_smoothing = label_smoothing
        self.schedule, self.head_schedule = schedule, head_schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        network = fresh(network, runtime.derive("trap"), method="trap_and_replace").eval()
        found = blocks(network, method="trap_and_replace", least=self.head_blocks + 1)
        cut, *trapped = found[-1 - self.head_blocks :]
        self.bait(network, cut, data, runtime.stage("bait"))
        self.replace(network, cut, trapped, data, runtime)
        return network

    def bait(self, network: Normalized, cut: nn.Module, data: DefenderData, own: Runtime) -> None:
        """Stage 1, in place: learn the poisoned set, and images (B, C, H, W) from ``cut``."""
        with capture([cut]) as seen, torch.no_grad():
            network.eval()(network.probe())
        with fork(own.derive("decoder")):
            picture = decoder(seen[0], network.spec.image_size, network.spec.channels)
        picture.to(seen[0])

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            with capture([cut]) as seen:
                total = F.cross_entropy(net(x), batch.labels)
            drawn = picture(seen[0]).float()
            total = total + self.picture_weight * F.mse_loss(drawn, x)
            return total + self.smooth_weight * total_variation_squared(drawn)

        own.train(
            network,
            data.poisoned(),
            self.schedule,
            purpose="bait",
            role="bait",
            loss=loss,
            players=[Player(network=picture, schedule=self.schedule)],
            beside=picture,
        )

    def replace(
        self,
        network: Normalized,
        cut: nn.Module,
        trapped: list[nn.Module],
        data: DefenderData,
        runtime: Runtime,
    ) -> None:
        """Stage 2: reset and retrain the head on the clean images; ``trapped`` are its blocks."""
        head = executed_after(network.eval(), cut, network.probe())
        network.requires_grad_(False)
        with fork(runtime.derive("head")):
            for layer in head:
                layer.reset_parameters()
                layer.requires_grad_(True)
        mix = v2.CutMix(alpha=1.0, num_classes=network.spec.classes)
        dropout = Dropout(self.dropout)

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            dropout.rng = batch.rng
            for layer in head:
                layer.train()  # the rest of the network stays in eval mode
            with fork(runtime.derive("cutmix", batch.progress)):
                x, y = mix(batch.images, batch.labels)
                logits = net(x)
            return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)

        inner = [m for b in trapped for n, m in b.named_children() if n == "conv2"]
        with inserted(dropout, before=inner, after=[(trapped or [cut])[-1]]):
            runtime.train(
                network,
                data.clean(),
                self.head_schedule,
                purpose="replace",
                role="head",
                loss=loss,
                train_mode=False,
            )


def decoder(features: Tensor, size: int, channels: int) -> nn.Sequential:
    """Transposed 4x4 convolutions of stride 2 from features (B, C, h, w) up to the image."""
    width, side = features.shape[1], features.shape[-1]
    layers: list[nn.Module] = []
    while 2 * side < size:
        half = max(32, width // 2)
        layers += [nn.ConvTranspose2d(width, half, 4, 2, 1), nn.ReLU(inplace=True)]
        width, side = half, 2 * side
    if side < size:
        layers.append(nn.ConvTranspose2d(width, channels, 4, 2, 1))
        side *= 2
    else:
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
    layers.append(nn.Sigmoid())
    if side != size:
        layers.append(nn.Upsample(size=(size, size), mode="bilinear"))
    return nn.Sequential(*layers)
