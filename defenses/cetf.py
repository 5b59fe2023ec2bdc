"""CETF: class-activation-focused evolutionary trigger filter (Zhou et al. 2024, 2407.05396)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.masks import batch_norms
from dhbe.methods.rectangles import best_rectangle
from dhbe.methods.statistics import confident
from dhbe.models import Normalized
from dhbe.models.hooks import smooth_cam
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class Found(NamedTuple):
    """A trigger: its pixels (C, H, W), where they are (H, W) bool, the class they lead to."""

    pixels: Tensor
    where: Tensor
    target: int


class CETF(Defense):
    """Search every incoming image for a rectangle that carries its prediction to other images.

    SmoothGrad-CAM++ of the predicted class bounds the search, differential evolution maximises
    ``fitness``; a rectangle that works on half of the verification images is a trigger.

    Repair with clean images and the triggers: ``unlearning`` fine-tunes on triggered images with
    true labels, ``bn_unlearning`` BatchNorm alone; ``bn_cleaning`` adapts it to clean images.
    Nothing found leaves the network as it is.

    Args:
        margin: pixels of a 32-pixel image added around the class-activation box.
        least_side: of the rectangle, in pixels of a 32-pixel image (published: 4 of 160).
        population, generations: of differential evolution.
        backgrounds, verification: clean images used to score and to verify.
        inputs: incoming images searched at most (0: all); published: 44,000 passes for each.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9, incoming=1)

    def __init__(
        self,
        *,
        repair_with: Literal["unlearning", "bn_cleaning", "bn_unlearning"],
        cam_threshold: Annotated[float, Gt(0), Le(1)],
        margin: Annotated[int, Ge(0)],
        least_side: Annotated[int, Ge(1)],
        population: Annotated[int, Ge(5)],
        generations: Annotated[int, Ge(1)],
        backgrounds: Annotated[int, Ge(1)],
        verification: Annotated[int, Ge(1)],
        confidence: Annotated[float, Gt(0), Le(1)],
        inputs: Annotated[int, Ge(0)],
        schedule: AdamSchedule,
    ) -> None:
        self.repair_with, self.cam_threshold, self.margin = repair_with, cam_threshold, margin
        self.least_side, self.population, self.generations = least_side, population, generations
        self.backgrounds, self.verification, self.confidence = backgrounds, verification, confidence
        self.inputs, self.schedule = inputs, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        network.requires_grad_(False)
        with runtime.autocast():
            found = self.detect(network, data, runtime)
        network.requires_grad_(True)
        how = f"cetf, {len(found)} triggers in the incoming images"
        runtime.recorder.suspect([*{f.target for f in found}], how)
        if not found:
            return network
        runtime.recorder.picture("triggers_found", torch.stack([f.pixels for f in found[:16]]))
        if self.repair_with != "unlearning":
            network.requires_grad_(False)
            for layer in batch_norms(network, method="cetf"):
                layer.requires_grad_(True)
        pixels, places = (torch.stack(t) for t in list(zip(*found, strict=True))[:2])

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y, rng = batch.images, batch.labels, batch.rng
            if self.repair_with != "bn_cleaning":
                one = torch.randint(len(found), (1,), generator=rng, device=rng.device)
                x = torch.cat([x, torch.where(places[one], pixels[one], x)])
                y = y.repeat(2)
            return F.cross_entropy(net(x), y)

        runtime.train(network, data.clean(), self.schedule, purpose="cetf repair", loss=loss)
        return network

    def detect(self, network: Normalized, data: DefenderData, runtime: Runtime) -> list[Found]:
        """Triggers of the incoming images that carry one."""
        inputs = runtime.tensor(data.incoming())
        others = runtime.tensor(data.clean())
        others = others[torch.randperm(len(others), generator=runtime.rng("cetf backgrounds"))]
        scene, witnesses = others[: self.backgrounds], others[-self.verification :]
        found = []
        for position, x in enumerate(inputs[: self.inputs or None]):
            trigger = self.search(network, x, scene, runtime.derive("cetf", position))
            if trigger is not None:
                worn = torch.where(trigger.where, trigger.pixels, witnesses)
                if confident(network, worn, trigger.target, self.confidence).mean() >= 0.5:
                    found.append(trigger)
        return found

    def search(self, network: Normalized, x: Tensor, scene: Tensor, seed: int) -> Found | None:
        """The best rectangle of one image (C, H, W), or None if none scores above zero."""
        scale, label = x.shape[-1] / 32, int(network(x[None]).argmax())
        heat = smooth_cam(network, x, label, seed)
        where = best_rectangle(
            lambda where: fitness(network, x, label, scene, where, self.confidence),
            heat >= self.cam_threshold * heat.max(),
            margin=round(self.margin * scale),
            least_side=max(1, round(self.least_side * scale)),
            population=self.population,
            generations=self.generations,
            seed=seed,
        )
        return None if where is None else Found(pixels=x * where, where=where, target=label)


def fitness(
    network: Normalized, x: Tensor, label: int, scene: Tensor, where: Tensor, confidence: float
) -> Tensor:
    """10^4 (flip + share) - area penalty of rectangles (S,), as published.

    flip: filling it with the image's mean colour changes the prediction; share: of the ``scene``
    (N, C, H, W) that gets the prediction, with ``confidence``, when its pixels are pasted.

    Args:
        x, label: the image (C, H, W) and what the network takes it for.
        where: the rectangles (S, H, W) bool.
    """
    where = where[:, None]
    filled = torch.where(where, x.mean(dim=(1, 2))[:, None, None], x)
    flip = (network(filled).argmax(dim=1) != label).double()
    pasted = torch.where(where[:, None], x, scene)  # (S, N, C, H, W)
    sure = confident(network, pasted.flatten(0, 1), label, confidence)
    share = sure.view(len(where), -1).mean(dim=1)
    area = where.flatten(1).sum(dim=1) * (160 / x.shape[-1]) ** 2  # published for 160 pixels
    gain: Tensor = 1e4 * (flip + share) - area.double().square() / 2560
    return gain
