"""CETF: an evolutionary search for each input's trigger, and light repairs (Luo et al. 2024).

Class-activation-focused evolutionary trigger filter, arXiv 2407.05396.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from scipy.optimize import OptimizeResult, differential_evolution
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, TrainingBatches, to_float
from dhbe.methods.masks import norms
from dhbe.models import Normalized
from dhbe.models.hooks import smooth_cam
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule
from dhbe.training.supervised import Supervised


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

    # ------------------------------------------------------------------ detection

    def detect(self, network: Normalized, data: DefenderData, runtime: Runtime) -> list[Found]:
        """Triggers of the incoming images that carry one."""
        inputs = data.incoming()
        clean = data.clean().resident()
        order = torch.randperm(len(clean), generator=runtime.rng("cetf backgrounds"))
        others = to_float(clean.images[order].to(runtime.device)).to(runtime.dtype)
        scene, witnesses = others[: self.backgrounds], others[-self.verification :]
        found = []
        for position in range(min(self.inputs or len(inputs), len(inputs))):
            raw = inputs.images[position : position + 1]
            x = to_float(raw.to(runtime.device)).to(runtime.dtype)[0]
            trigger = self.search(network, x, scene, runtime.derive("cetf", position))
            if trigger is not None and self.carried(network, trigger, witnesses) >= 0.5:
                found.append(trigger)
        return found

    def search(self, network: Normalized, x: Tensor, scene: Tensor, seed: int) -> Found | None:
        """The best rectangle of one image (C, H, W), or None if none scores above zero."""
        size = x.shape[-1]
        scale = size / 32
        label = int(network(x[None]).argmax())
        top, left, bottom, right = self.box(network, x, label, seed)
        least = max(1, round(self.least_side * scale))
        high = max(least, bottom - top), max(least, right - left)
        bounds = [(top, max(top, bottom - least)), (left, max(left, right - least))]
        bounds += [(least, high[0]), (least, high[1])]
        mean = x.mean(dim=(1, 2))[:, None, None]

        def score(values: np.ndarray) -> np.ndarray:
            """Minus the objective of rectangles (4, S), as (S,)."""
            where = rectangles(torch.from_numpy(values.reshape(4, -1).round()).long(), size)
            where = where.to(x.device)[:, None]
            filled = torch.where(where, mean, x)
            flip = (network(filled).argmax(dim=1) != label).double()
            pasted = torch.where(where[:, None], x, scene)  # (S, backgrounds, C, H, W)
            sure = network(pasted.flatten(0, 1)).softmax(dim=1)[:, label] > self.confidence
            share = sure.view(len(where), -1).double().mean(dim=1)
            area = where.flatten(1).sum(dim=1) * (160 / size) ** 2  # published for 160 pixels
            gain = 1e4 * (flip + share) - area.double().square() / 2560
            return np.asarray(-gain.cpu())

        with torch.no_grad():
            best = differential_evolution(
                score,
                bounds,
                strategy="rand1bin",
                maxiter=self.generations,
                popsize=max(2, self.population // 4),
                mutation=0.5,
                recombination=0.7,
                rng=np.random.default_rng(seed),
                polish=False,
                updating="deferred",
                vectorized=True,
                integrality=np.ones(4, dtype=bool),
                tol=0,
                callback=Stagnation(),
            )
        if best.fun >= 0:
            return None
        where = rectangles(torch.from_numpy(best.x.round()).long()[:, None], size)[0]
        where = where.to(x.device)
        return Found(pixels=x * where, where=where, target=label)

    def box(
        self, network: Normalized, x: Tensor, label: int, seed: int
    ) -> tuple[int, int, int, int]:
        """Rows and columns (top, left, bottom, right) where the class activation is high."""
        size = x.shape[-1]
        heat = smooth_cam(network, x, label, seed, method="cetf")
        rows, columns = (heat >= self.cam_threshold * heat.max()).nonzero(as_tuple=True)
        margin = round(self.margin * size / 32)
        top, left = (max(0, int(v.min()) - margin) for v in (rows, columns))
        bottom, right = (min(size, int(v.max()) + 1 + margin) for v in (rows, columns))
        return top, left, bottom, right

    @torch.no_grad()
    def carried(self, network: Normalized, trigger: Found, images: Tensor) -> float:
        """Share of images that the trigger takes to its class, with confidence."""
        sure = network(torch.where(trigger.where, trigger.pixels, images)).softmax(dim=1)
        return float((sure[:, trigger.target] > self.confidence).double().mean())

    # ------------------------------------------------------------------ repair

    def heal(
        self, network: Normalized, found: list[Found], data: DefenderData, runtime: Runtime
    ) -> None:
        """Fine-tune in place, as ``repair_with`` says."""
        if self.repair_with != "unlearning":
            layers = norms(network, method="cetf")
            network.requires_grad_(False)
            for layer in layers:
                layer.requires_grad_(True)
        batches = TrainingBatches(
            data.clean(),
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            seed=runtime.derive("cetf repair"),
            device=runtime.device,
        )

        pixels, places = (torch.stack(t) for t in list(zip(*found, strict=True))[:2])

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            x, y, rng = batch.images.to(runtime.dtype), batch.labels, batches.noise
            if self.repair_with != "bn_cleaning":
                one = torch.randint(len(found), (1,), generator=rng, device=rng.device)
                x = torch.cat([x, torch.where(places[one], pixels[one], x)])
                y = y.repeat(2)
            return F.cross_entropy(net(x), y)

        module = Supervised(network, batches, self.schedule, role="student", loss=loss)
        runtime.fit(module, batches, epochs=self.schedule.epochs)


class Stagnation:
    """Ends the evolution after 10 generations without progress of 1e-6."""

    def __init__(self) -> None:
        self.best, self.idle = float("inf"), 0

    def __call__(self, intermediate_result: OptimizeResult) -> bool:
        self.idle = 0 if self.best - intermediate_result.fun > 1e-6 else self.idle + 1
        self.best = min(self.best, intermediate_result.fun)
        return self.idle >= 10


def rectangles(values: Tensor, size: int) -> Tensor:
    """Masks (S, size, size) bool of rectangles (4, S): top, left, height, width."""
    at = torch.arange(size)
    top, left, height, width = (v[:, None] for v in values)
    rows = (at >= top) & (at < top + height)
    columns = (at >= left) & (at < left + width)
    inside: Tensor = rows[:, :, None] & columns[:, None, :]
    return inside
