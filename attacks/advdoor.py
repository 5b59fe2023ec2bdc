"""AdvDoor: a targeted universal adversarial perturbation as trigger (Zhang et al., ISSTA 2021)."""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Fraction, Poisoning
from dhbe.data import ImageSet
from dhbe.methods.patterns import sample
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

log = logging.getLogger(__name__)


class AdvDoor(Attack):
    """T(x) = clip(x + v), v in an l-infinity ball and adversarial for a clean surrogate.

    TUAP-DeepFool: image after image that x + v does not lead to the target, v moves by DeepFool's
    targeted perturbation of x + v and is projected on the ball, until x + v leads enough images
    away from their class (official ``universal_perturbation``).

    Args:
        epsilon: of the ball, in levels of 255.
        images: that are attacked, drawn from the training images.
        passes: over them, at most.
        fooled: share of them that suffices.
        deepfool_steps: per image; one that needs them all leaves v as it is.
        overshoot: of DeepFool.
        confidence: probability of the target at which DeepFool stops.
    """

    needs_surrogate: ClassVar[bool] = True
    portable = False
    pattern: Tensor

    def __init__(
        self,
        *,
        epsilon: Annotated[float, Gt(0), Le(255)],
        images: Annotated[int, Ge(1)],
        passes: Annotated[int, Ge(1)],
        fooled: Fraction,
        deepfool_steps: Annotated[int, Ge(2)],
        overshoot: Annotated[float, Ge(0)],
        confidence: Fraction,
        **options: Unpack[Poisoning],
    ) -> None:
        super().__init__(**options)
        self.epsilon, self.images, self.passes = epsilon / 255, images, passes
        self.fooled, self.deepfool_steps = fooled, deepfool_steps
        self.overshoot, self.confidence = overshoot, confidence
        self.register_buffer("pattern", torch.zeros(self.spec.shape))

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator
        assert surrogate is not None
        rng = runtime.rng("advdoor")
        able = train.subset(self.rule.eligible(train.labels).nonzero().flatten())
        some = sample(able, self.images, rng)
        x, y = runtime.tensor(some), runtime.labels(some)
        goal, v = self.rule.goal(y), torch.zeros_like(x[0])
        for _ in range(self.passes):
            for i in torch.randperm(len(x), generator=rng).tolist():
                step = deepfool(
                    surrogate,
                    x[i] + v,
                    source=int(y[i]),
                    target=int(goal[i]),
                    steps=self.deepfool_steps,
                    overshoot=self.overshoot,
                    confidence=self.confidence,
                )
                v = (v + step).clamp(-self.epsilon, self.epsilon)
            with torch.no_grad():
                predicted = surrogate((x + v).clamp(0, 1)).argmax(dim=1)
            share = float((predicted != y).float().mean())
            log.info("advdoor: %.1f %% of %d images are fooled", 100 * share, len(x))
            if share >= self.fooled:
                break
        if not v.any():
            log.warning("attack=advdoor found no perturbation: its trigger changes nothing")
        self.pattern.copy_(v)

    def trigger(self, x: Tensor) -> Tensor:
        return x + self.pattern


def deepfool(
    network: nn.Module,
    image: Tensor,
    *,
    source: int,
    target: int,
    steps: int,
    overshoot: float,
    confidence: float,
) -> Tensor:
    """Perturbation (C, H, W) that leads an image to the target; zero if it is there, or not found.

    Each step is 2 |f_t - f_s| w / |w|^2 with w the gradient of f_t - f_s, twice the distance to the
    linearised boundary between source and target.

    Args:
        image: (C, H, W), may leave [0, 1]; what it becomes does not.
    """
    total = torch.zeros_like(image)
    for step in range(steps - 1):
        moved = image if step == 0 else (image + (1 + overshoot) * total).clamp(0, 1)
        total = total if step == 0 else (moved - image) / (1 + overshoot)
        moved = moved.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = network(moved[None])[0]
            margin = logits[target] - logits[source]
            (w,) = torch.autograd.grad(margin, moved)
        sure = logits.detach().softmax(0)
        if int(sure.argmax()) == target and (step == 0 or float(sure[target]) >= confidence):
            return (1 + overshoot) * total
        total = total + 2 * margin.detach().abs() * w / w.square().sum().clamp_min(1e-12)
    return torch.zeros_like(image)
