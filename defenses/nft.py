"""NFT: neural mask fine-tuning (Karim et al., ECCV 2024, arXiv 2407.10052)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.masks import attach, batch_norms, fold
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule, Stairs


class NFT(Defense):
    """Tune masks on BatchNorm's gamma alone, with mixup and a pull towards 1.

    min_m E[lambda CE(f(x_mix), y_a) + (1 - lambda) CE(f(x_mix), y_b)] + (pull / N_c) sum |1 - m|,
    lambda uniform, N_c clean images per class; after each step m is clamped to [low_l, 1], with
    low_l = alpha_s exp(-beta_s l) for the l-th mask: shallow channels cannot vanish. The rate
    stays the same through each epoch.

    Args:
        pull: eta_c.
        floor, decay: alpha_s and beta_s.
        depth: number of masks that alpha_s and beta_s are meant for (ResNet-18: 20): in another
            network of L masks, l counts as l depth / L, so that the last floor is the same. 0: l
            is taken as it is (official), and a shallow network keeps all its channels.
        steps: batches per epoch, drawn with replacement.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        pull: Annotated[float, Ge(0)],
        floor: Annotated[float, Ge(0), Le(1)],
        decay: Annotated[float, Gt(0)],
        depth: Annotated[int, Ge(0)],
        steps: Annotated[int, Ge(1)],
        schedule: Schedule,
    ) -> None:
        self.pull, self.floor, self.decay = pull, floor, decay
        self.depth, self.steps = depth, steps
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()
        layers = batch_norms(network, method="nft")
        network.requires_grad_(False)
        scales = attach(layers)
        lows = self.floors(len(scales))
        per_class = len(clean) / network.spec.classes

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y, rng = batch.images, batch.labels, batch.rng
            share = torch.rand((), generator=rng, device=x.device, dtype=x.dtype)  # Beta(1, 1)
            order = torch.randperm(len(x), generator=rng, device=x.device)
            logits = net(share * x + (1 - share) * x[order])
            mixed = share * F.cross_entropy(logits, y)
            mixed = mixed + (1 - share) * F.cross_entropy(logits, y[order])
            away = torch.stack([(1 - s.mask).abs().sum() for s in scales]).sum()
            return mixed + self.pull / per_class * away

        @torch.no_grad()
        def bound() -> None:
            for scale, low in zip(scales, lows, strict=True):
                scale.mask.clamp_(low, 1)

        runtime.train(
            network,
            clean,
            self.held(),
            purpose="nft",
            role="masks",
            steps=self.steps,
            loss=loss,
            after_step=bound,
        )
        fold(layers)
        return network

    def held(self) -> Schedule:
        """The schedule with the same rate through each epoch."""
        stairs = Stairs(shape=self.schedule.shape, steps=self.schedule.epochs)
        return replace(self.schedule, shape=stairs)

    def floors(self, count: int) -> list[float]:
        """Lowest value of each of ``count`` masks."""
        per_mask = self.depth / count if self.depth else 1.0
        return [self.floor * math.exp(-self.decay * per_mask * (i + 1)) for i in range(count)]
