"""Find the target class on imagined images and unlearn its triggers alone. Ours, data-free."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from dhbe.contracts.defense import Defense
from dhbe.core.errors import got
from dhbe.core.types import Batch, DataSpec
from dhbe.data import DefenderData, Resident
from dhbe.game.imagined import Imagination
from dhbe.methods.inversion import Kind, Mixture
from dhbe.methods.losses import denial, disagreement, divergence_beside
from dhbe.methods.procedural import procedural
from dhbe.methods.scan import Scan
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import AdamSchedule


class ScanUnlearn(Defense):
    """Scan, then a game against the triggers of one class; BatchNorm stays frozen.

    Imagine images of every class; for each class and kind of trigger seek one that makes those of
    all other classes this class (``Scan``). If the score of one reaches ``threshold``, the
    student S, a copy of the suspect T, minimises

        L1(S(x), T(x)) - weight log(1 - S_t(x')) + restore KL(T(x) || S(x') beside t)

    where t is the target and x' carries triggers of the families in which t reaches the threshold;
    they climb the last two terms as it learns. The weights then go ``share`` of the way from T to
    S. Else the suspect is returned as it is.

    Copying all of T(x) on x' cost accuracy and left faint triggers; without the last term x' left
    the target for any other class. With batch statistics the trigger stayed.

    Args:
        threshold: of ``Evidence.score``.
        erase: whether to unlearn at all; if not, the suspect is returned as it is.
        copies: triggers per kind and variant; they climb ``head_start`` steps before the
            student's first one.
        pace: their step, as a share of the range of values.
        weight, restore: of the terms that deny the target and restore the other classes' order.
        share: of the student's change that is kept, in (0, 1].
    """

    def __init__(
        self,
        *,
        imagination: Imagination,
        scan: Scan,
        threshold: Annotated[float, Gt(0)],
        erase: bool,
        copies: Annotated[int, Ge(1)],
        head_start: Annotated[int, Ge(0)],
        pace: Annotated[float, Gt(0)],
        weight: Annotated[float, Ge(0)],
        restore: Annotated[float, Ge(0)],
        share: Annotated[float, Gt(0), Le(1)],
        schedule: AdamSchedule,
    ) -> None:
        self.imagination, self.scan = imagination, scan
        self.threshold, self.idle = threshold, not erase
        self.copies, self.head_start = copies, head_start
        self.pace, self.share = pace, share
        self.weight, self.restore = weight, restore
        self.schedule = schedule

    def fits(self, spec: DataSpec) -> None:
        for key in ("patches", "larger", "corners"):
            if max(sides := getattr(self.scan, key), default=0) > spec.image_size:
                allowed = f"at most data.image_size={spec.image_size} each"
                raise got(f"defense.scan.{key}", sides, allowed)

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        del data  # no image at all is looked at
        network.requires_grad_(False)
        x, y = self.imagination.images(network, runtime)
        runtime.recorder.picture("imagined", x[:100])
        every = self.scan(network, x, y, runtime)
        most = max(every, key=lambda e: e.score)
        flagged = [most.target] if most.score >= self.threshold else []
        each = ", ".join(f"{e.family} into class {e.target} {e.score:.2f}" for e in every)
        scores = [max(of_class) for of_class in zip(*(e.scores for e in every), strict=True)]
        how = f"scan_unlearn, highest score by kind of trigger, suspicious from {self.threshold:g}"
        how = f"{how}: {each}"
        runtime.recorder.suspect(flagged, how, scores)
        if flagged and not self.idle:
            others = x[y != most.target]  # imagined images of the target hold its trigger
            kinds = [k for e in every if e.scores[most.target] >= self.threshold for k in e.kinds]
            self.unlearn(network, others, most.target, kinds, runtime)
        return network

    def unlearn(
        self, network: Normalized, x: Tensor, target: int, kinds: Sequence[Kind], runtime: Runtime
    ) -> None:
        """Train the student, in place, to ignore triggers of ``target`` on x (N, C, H, W)."""
        teacher, spec = copy.deepcopy(network), network.spec
        rng = runtime.rng("unlearn")
        triggers = Mixture(kinds, self.copies, spec.channels, rng, x)
        plain = procedural(self.imagination.count, spec.channels, spec.image_size, rng)
        given = torch.cat([x, plain.to(x)])
        images = Resident(given.mul(255).round().byte(), torch.zeros(len(given), dtype=torch.long))

        def climb() -> None:
            runtime.processes.average(p.grad for p in triggers.parameters() if p.grad is not None)
            triggers.climb(self.pace)

        for _ in range(self.head_start):
            drawn = torch.randint(len(given), (self.schedule.batch_size,), generator=rng)
            with runtime.autocast():
                logits = network(triggers(given[drawn.to(x.device)], rng)).float()
            logits.log_softmax(dim=1)[:, target].sum().backward()
            climb()

        def loss(student: nn.Module, batch: Batch) -> Tensor:
            x = batch.images
            with torch.no_grad():
                wanted = teacher(x)
            copied, moved = student(torch.cat([x, triggers(x, batch.rng)])).chunk(2)
            of_others = wanted.argmax(dim=1) != target
            of_target = torch.full((len(x),), target, device=x.device)
            unsaid = denial(moved.float(), of_target)
            again = divergence_beside(moved.float(), wanted.float(), target)
            of_triggered = self.weight * unsaid + self.restore * again
            total: Tensor = disagreement(copied, wanted) + (of_triggered * of_others).mean()
            return total

        network.requires_grad_(True)
        runtime.train(
            network,
            images,
            self.schedule,
            purpose="scan_unlearn",
            loss=loss,
            beside=triggers,
            train_mode=False,
            after_step=climb,
        )
        with torch.no_grad():
            for kept, before in zip(network.parameters(), teacher.parameters(), strict=True):
                kept.lerp_(before, 1 - self.share)
