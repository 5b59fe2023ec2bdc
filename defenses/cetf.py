"""CETF: an evolutionary search for each input's trigger, and light repairs (Luo et al. 2024).

Class-activation-focused evolutionary trigger filter, arXiv 2407.05396.
"""

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
from dhbe.models import Normalized
from dhbe.models.hooks import bounding_box, smooth_cam
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class Found(NamedTuple):
    """A trigger: its pixels (C, H, W), where they are (H, W) bool, the class they lead to."""

    pixels: Tensor
    where: Tensor
    target: int


class CETF(Defense):
    """Search every incoming image for a rectangle that carries its prediction to other images.

    Detection: SmoothGrad-CAM++ of the predicted class bounds the search; differential evolution
    (rand/1/bin) looks for the rectangle that maximises 10^4 (flip + n / backgrounds) - area
    penalty. flip: filling it with the image's mean colour changes the prediction; n: on how many
    backgrounds pasting it gives the prediction with confidence above ``confidence``. A rectangle
    that does so on at least half of the verification images is a trigger.

    Repair with clean images and the triggers: ``unlearning`` fine-tunes on stamped images with true
    labels; ``bn_cleaning`` adapts BatchNorm to clean images; ``bn_unlearning`` is the first
    restricted to BatchNorm. Nothing found leaves the network as it is.

    Args:
        repair_with: one of the three.
        margin: pixels of a 32-pixel image added around the class-activation box.
        least_side: of the rectangle, in pixels of a 32-pixel image (published: 4 of 160).
        population, generations: of differential evolution.
        backgrounds, verification: clean images used to score and to verify.
        inputs: incoming images searched at most (0: all); the published search costs about 44,000
            forward passes for each.
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
        classes = {f.target for f in found}
        runtime.recorder.suspect([*classes], f"cetf, {len(found)} triggers in the incoming images")
        if not found:
            return network
        runtime.recorder.picture("triggers_found", torch.stack([f.pixels for f in found[:16]]))
        self.heal(network, found, data, runtime)
        return network

    def detect(self, network: Normalized, data: DefenderData, runtime: Runtime) -> list[Found]:
        """Triggers of the incoming images that carry one."""
        inputs = runtime.tensor(data.incoming())
        clean = data.clean()
        order = torch.randperm(len(clean), generator=runtime.rng("cetf backgrounds"))
        others = runtime.tensor(clean.subset(order))
        scene, witnesses = others[: self.backgrounds], others[-self.verification :]
        found = []
        for position, x in enumerate(inputs[: self.inputs or None]):
            trigger = self.search(network, x, scene, runtime.derive("cetf", position))
            if trigger is not None and self.carried(network, trigger, witnesses) >= 0.5:
                found.append(trigger)
        return found

    def search(self, network: Normalized, x: Tensor, scene: Tensor, seed: int) -> Found | None:
        """The best rectangle of one image (C, H, W), or None if none scores above zero."""
        size, scale = x.shape[-1], x.shape[-1] / 32
        label = int(network(x[None]).argmax())
        heat = smooth_cam(network, x, label, seed)
        box = bounding_box(
            heat >= self.cam_threshold * heat.max(), margin=round(self.margin * scale)
        )

        def gain(where: Tensor) -> Tensor:
            return fitness(network, x, label, scene, where.to(x.device), self.confidence)

        where = best_rectangle(
            gain,
            box,
            least_side=max(1, round(self.least_side * scale)),
            size=size,
            population=self.population,
            generations=self.generations,
            seed=seed,
        )
        if where is None:
            return None
        where = where.to(x.device)
        return Found(pixels=x * where, where=where, target=label)

    @torch.no_grad()
    def carried(self, network: Normalized, trigger: Found, images: Tensor) -> float:
        """Share of images that the trigger takes to its class, with confidence."""
        sure = network(torch.where(trigger.where, trigger.pixels, images)).softmax(dim=1)
        return float((sure[:, trigger.target] > self.confidence).double().mean())

    def heal(
        self, network: Normalized, found: list[Found], data: DefenderData, runtime: Runtime
    ) -> None:
        """Fine-tune in place, as ``repair_with`` says."""
        if self.repair_with != "unlearning":
            layers = batch_norms(network, method="cetf")
            network.requires_grad_(False)
            for layer in layers:
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


def fitness(
    network: Normalized, x: Tensor, label: int, scene: Tensor, where: Tensor, confidence: float
) -> Tensor:
    """10^4 (flip + share) - area penalty of rectangles in an image (S,), as published.

    Args:
        x, label: the image (C, H, W) and what the network takes it for.
        scene: images (N, C, H, W) that a rectangle's pixels are pasted on.
        where: rectangles (S, H, W) bool.
    """
    where = where[:, None]
    filled = torch.where(where, x.mean(dim=(1, 2))[:, None, None], x)
    flip = (network(filled).argmax(dim=1) != label).double()
    pasted = torch.where(where[:, None], x, scene)  # (S, N, C, H, W)
    sure = network(pasted.flatten(0, 1)).softmax(dim=1)[:, label] > confidence
    share = sure.view(len(where), -1).double().mean(dim=1)
    area = where.flatten(1).sum(dim=1) * (160 / x.shape[-1]) ** 2  # published for 160 pixels
    gain: Tensor = 1e4 * (flip + share) - area.double().square() / 2560
    return gain
