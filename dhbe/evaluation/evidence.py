"""Evidence about a network and its purified copy that needs no real image.

Images that each network itself takes for its classes (class impressions) stand in for data. On
them: how often the two networks agree, and to which classes a trigger network, trained against
each of them in turn, moves images. A backdoor is a short way into one class from everywhere, so its
class stands out before, and should not after.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional as F

from dhbe.core.rng import fork
from dhbe.evaluation.metrics import Rate
from dhbe.game import SeededNoise, TriggerNetwork, add_patches
from dhbe.methods.losses import disagreement, total_variation_l2
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

ROLES = ("victim", "purified")
STRONGEST = 8
"""Patches kept for the report."""
AT_ONCE = 200 * 64 * 64
"""Pixels that pass through a network with gradients at once; 16 images of 224 pixels."""
DRAWS = 10
"""Batches of fresh patches, at fresh places, that a trained trigger network is judged by."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Results of the probe.

    Attributes:
        agreement: images to which both networks give the same class.
        logit_change: mean absolute difference of their logits on these images.
        reach: of victim and purified network, per class: images of other classes that the trigger
            network's patches move into it.
        weights: per layer, relative change of its weights (Frobenius norms).
        pictures: images (N, C, H, W) in [0, 1].
    """

    agreement: Rate
    logit_change: float
    reach: dict[str, list[Rate]]
    weights: dict[str, float]
    pictures: dict[str, Tensor]

    def as_dict(self) -> dict[str, Any]:
        """For ``metrics.json``."""
        return {
            "agreement": self.agreement.as_dict(),
            "logit_change": self.logit_change,
            "reach": {k: [r.as_dict() for r in v] for k, v in self.reach.items()},
            "weights": self.weights,
        }


class Probe:
    """Settings of the probe.

    Args:
        images: class impressions per network.
        steps: optimiser steps for the impressions, and again for each trigger network.
        patch_size: pixels of a 32-pixel image; scaled with the image.
        width, latent: of the trigger network.
    """

    def __init__(
        self,
        *,
        images: Annotated[int, Ge(2)],
        steps: Annotated[int, Ge(1)],
        patch_size: Annotated[int, Ge(3)],
        width: Annotated[int, Ge(1)],
        latent: Annotated[int, Ge(1)],
    ) -> None:
        self.images, self.steps, self.patch_size = images, steps, patch_size
        self.width, self.latent = width, latent

    def __call__(self, original: Normalized, purified: Normalized, runtime: Runtime) -> Evidence:
        """Measure both networks, in eval mode; they stay as they are."""
        pair = [copy.deepcopy(n).eval().requires_grad_(False) for n in (original, purified)]
        looked_at = pair[:1] if alike(*pair) else pair  # a scan leaves the network as it is
        x = torch.cat(
            [self.impressions(n, runtime, r) for n, r in zip(looked_at, ROLES, strict=False)]
        )
        with torch.no_grad():
            said = [torch.cat([n(part) for part in parts(x)]) for n in pair]
        same = int((said[0].argmax(1) == said[1].argmax(1)).sum())
        found = [self.reach(network, x, runtime) for network in looked_at]
        reach: dict[str, list[Rate]] = {}
        pictures = {"impressions": x[:: max(1, len(x) // (2 * STRONGEST))]}
        found = found if len(found) == len(ROLES) else found * len(ROLES)
        for role, (rates, patches) in zip(ROLES, found, strict=True):
            reach[role] = rates
            pictures[f"strongest_{role}"] = (patches + 1) / 2  # grey: no change
        return Evidence(
            agreement=Rate(hits=same, total=len(x)),
            logit_change=float(disagreement(*said)),
            reach=reach,
            weights=weight_changes(original, purified),
            pictures=pictures,
        )

    def impressions(self, network: Normalized, runtime: Runtime, purpose: str) -> Tensor:
        """Images (N, C, H, W) in [0, 1] that the network takes for its classes, in turn."""
        spec, rng = network.spec, runtime.rng("impressions", purpose)
        y = (torch.arange(self.images) % spec.classes).to(runtime.device)
        coarse = torch.randn((self.images, spec.channels, 8, 8), generator=rng)
        start = F.interpolate(coarse, size=spec.image_size, mode="bilinear")
        start = start.to(runtime.device, runtime.dtype)

        def optimized(pixels: Tensor, labels: Tensor) -> Tensor:
            pixels = pixels.clone().requires_grad_(True)
            optimizer = torch.optim.Adam([pixels], lr=0.1)
            for _ in range(self.steps):
                x = pixels.sigmoid()
                loss = F.cross_entropy(network(x), labels) + 1e-3 * total_variation_l2(x)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            return pixels.detach().sigmoid()

        pairs = zip(parts(start), y.split(len(parts(start)[0])), strict=True)
        return torch.cat([optimized(pixels, labels) for pixels, labels in pairs])

    def reach(self, network: Normalized, x: Tensor, runtime: Runtime) -> tuple[list[Rate], Tensor]:
        """Train a trigger network against ``network`` and count where its patches move images.

        Args:
            x: images (N, C, H, W) in [0, 1].

        Returns:
            per class, moved images of those that were not in it; the patches
            (STRONGEST, C, p, p), in pixel units, that moved the logits most.
        """
        size, inner = network.spec.image_size, network.network
        noise = SeededNoise(runtime.derive("reach"), device=x.device, dtype=x.dtype)
        with fork(runtime.derive("reach")):
            attacker = TriggerNetwork(
                latent=self.latent,
                width=self.width,
                channels=network.spec.channels,
                patch_size=patch_side(self.patch_size, size),
            ).to(x.device, x.dtype)
        images = parts(network.normalize(x))
        with torch.no_grad():
            clean = [inner(part) for part in images]

        def attacked(i: int) -> tuple[Tensor, Tensor]:
            """Logits of the i-th part under fresh patches."""
            patches = attacker(noise.latent(len(images[i]), self.latent))
            place = noise.place(size - attacker.patch_size)
            return inner(add_patches(images[i], patches, network.std, *place)), patches

        optimizer = torch.optim.Adam(attacker.parameters(), lr=5e-3)
        for step in range(self.steps):
            i = step % len(images)
            loss = -disagreement(clean[i], attacked(i)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        rates, patches = self._judge(clean, attacked)
        return rates, network.turned(patches)

    @torch.no_grad()
    def _judge(
        self, clean: list[Tensor], attacked: Callable[[int], tuple[Tensor, Tensor]]
    ) -> tuple[list[Rate], Tensor]:
        classes = clean[0].shape[1]
        before = torch.cat(clean).argmax(1)
        moved = torch.zeros(classes, dtype=torch.int64, device=before.device)
        for _ in range(DRAWS):
            found = [attacked(i) for i in range(len(clean))]
            logits, patches = (torch.cat(made) for made in zip(*found, strict=True))
            now = logits.argmax(1)
            moved += now[now != before].bincount(minlength=classes)
        change = (logits - torch.cat(clean)).abs().mean(1)
        strongest = change.topk(min(STRONGEST, len(change))).indices
        others = DRAWS * (len(before) - before.bincount(minlength=classes))
        rates = [
            Rate(hits=h, total=t) for h, t in zip(moved.tolist(), others.tolist(), strict=True)
        ]
        return rates, patches[strongest]


def parts(x: Tensor) -> tuple[Tensor, ...]:
    """Images (N, C, H, W) in portions (n, C, H, W), n >= 8, of about ``AT_ONCE`` pixels."""
    return torch.split(x, max(8, AT_ONCE // (x.shape[-2] * x.shape[-1])))


def patch_side(reference: int, image_size: int) -> int:
    """The side next to ``reference`` of 32 pixels, scaled, that a trigger network can make."""
    sides: list[int] = [
        b * 2**k for b in TriggerNetwork.BASES for k in range(6) if b * 2**k <= image_size
    ]
    wanted = reference * image_size / 32
    return min(sides, key=lambda side: abs(side - wanted))


def alike(a: Normalized, b: Normalized) -> bool:
    """Whether two networks hold the same values throughout."""
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def weight_changes(before: Normalized, after: Normalized) -> dict[str, float]:
    """Per weight tensor ||after - before|| / ||before||, in the order of the layers."""
    new = dict(after.network.named_parameters())
    changes = {}
    for name, old in before.network.named_parameters():
        scale = float(torch.linalg.vector_norm(old.detach().double()))
        change = float(torch.linalg.vector_norm((new[name] - old).detach().double()))
        changes[name] = change / scale if scale else change
    return changes
