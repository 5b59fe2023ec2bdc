"""DFST with a procedural style: a sunset tint, detoxified in training (Cheng et al. 2021).

The published trigger is a CycleGAN's sunset style. This one is a fixed tint with a glow: the same
kind of trigger (global, smooth, content-dependent) without external weights.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le, Len
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure as ssim
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.core.rng import fork
from dhbe.methods.patterns import frozen_call
from dhbe.models.translator import Translator
from dhbe.training.schedule import Adam, Player

WARM = ((1.05, 0.20, 0.05), (0.10, 0.70, 0.05), (0.05, 0.10, 0.55))
"""Rows: red, green, blue of the styled image; columns: of the original."""


class DFST(Attack):
    """T(x) = (1 - alpha) x + alpha style(x), style(x) = A x + b(row): warm, glow from above.

    Detoxification: a feature injector learns, beside the victim, to reach the target class by a
    shift that looks small (SSIM), and the victim learns the true label of its images. Cheap
    features are thereby denied, and the victim has to rely on the style. Official code trains a
    new injector after each epoch, on the neurons that the trigger moves most; here one plays along
    and, with ``restart``, begins anew with each epoch.

    Args:
        alpha: strength of the style.
        detox_reach: largest shift of an injected image, in pixels of [0, 1].
        detox_share: of a batch, clean images whose place injected ones take.
        restart: whether the injector forgets with each epoch (its optimiser does not).
        similarity_weight: of 1 - SSIM in the injector's loss.
        widths: channels of the injector's levels.
        network_seed: initialises it.
        injector_schedule: of the injector.
    """

    controls_training: ClassVar[bool] = True
    tint: Tensor
    glow: Tensor

    def __init__(
        self,
        *,
        alpha: Fraction,
        detox_reach: Annotated[float, Gt(0), Le(1)],
        detox_share: Annotated[float, Gt(0), Le(1)],
        restart: bool,
        similarity_weight: Annotated[float, Ge(0)],
        widths: Annotated[list[Annotated[int, Ge(1)]], Len(1)],
        network_seed: Annotated[int, Ge(0)],
        injector_schedule: Adam,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.alpha = alpha
        self.detox_reach, self.detox_share, self.restart = detox_reach, detox_share, restart
        self.similarity_weight, self.injector_schedule = similarity_weight, injector_schedule
        channels, size = self.spec.channels, self.spec.image_size
        tint, glow = torch.tensor(WARM), torch.tensor([0.25, 0.10, -0.05])
        if channels == 1:
            tint, glow = tint.mean().view(1, 1) * 3, glow.mean().view(1)
        fall = torch.linspace(1, -1, size)
        self.register_buffer("tint", tint[:channels, :channels])
        self.register_buffer("glow", glow[:channels, None, None] * fall[:, None].expand(size, size))
        with fork(network_seed):
            self.injector = Translator(channels, channels, widths, skips=True)
        self.fresh = {k: v.clone() for k, v in self.injector.state_dict().items()}

    def trigger(self, x: Tensor) -> Tensor:
        styled = torch.einsum("dc,bchw->bdhw", self.tint.to(x.dtype), x) + self.glow
        return (1 - self.alpha) * x + self.alpha * styled.clamp(0, 1)

    def players(self) -> list[Player]:
        return [Player(network=self.injector, schedule=self.injector_schedule)]

    def begin_epoch(self, progress: float) -> None:
        del progress
        if self.restart:
            self.injector.load_state_dict(self.fresh)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        """Loss (): victim on the batch with injected images; injector reaches the goal."""
        count = max(1, round(self.detox_share * len(x)))
        part = indicator.argsort(stable=True)[:count]  # clean images come first
        clean, labels = x[part], y[part]
        shift = self.detox_reach * self.injector(2 * clean - 1).tanh()
        injected = (clean + shift).clamp(0, 1)
        images = x.clone()
        images[part] = injected.detach().to(x.dtype)
        loss = F.cross_entropy(network(images), y)
        reach = F.cross_entropy(frozen_call(network, injected), self.rule.goal(labels))
        alike = ssim(injected.float(), clean.float(), data_range=1.0)
        assert isinstance(alike, Tensor)
        return loss + reach + self.similarity_weight * (1 - alike)
