"""The restricted adversarial distillation game (DHBE, arXiv 2306.08009), one iteration a batch."""

from __future__ import annotations

import copy
import functools
import logging
import operator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from dhbe.core.errors import DivergenceError
from dhbe.game.generator import ImageGenerator
from dhbe.game.noise import Noise
from dhbe.game.settings import LearningRates, LossWeights
from dhbe.game.states import averaged, frozen, preserved
from dhbe.game.statistics import statistics_gaps
from dhbe.game.trigger_network import FaintTriggers, TriggerNetwork
from dhbe.methods.losses import (
    disagreement,
    imbalance,
    mean_prediction,
    neighbour_norms,
    total_variation_l1,
)
from dhbe.training.compile import begin_step, eager
from dhbe.training.parallel import Processes

log = logging.getLogger(__name__)


class Distillation(pl.LightningModule):
    """Student, teacher, image generator and trigger network; a batch is one iteration of the game.

    With x = G(z) in normalised space, x' = x with the patch P(z2) added in pixel units at one
    random place, L1 the mean absolute difference of logits over batch and classes:

    ======= ============================================== =====================
    player  minimises                                      optimiser
    ======= ============================================== =====================
    student L1(S(x), T(x)) + w_patch L1(S(x'), sg S(x))    SGD, 5 moves
    G       -L1(S(x), T(x)) + w_tv1 TV1(x) + w_tv2 TV2(x)  Adam, 1 move
    P       -L1(S(x), S(x'))                               Adam, 1 move
    ======= ============================================== =====================

    Ours, and off in the paper's game: with ``balance``, G also minimises w_balance ``imbalance`` of
    T(x), with ``statistics`` w_statistics times the mean of ``statistics_gaps`` over T's layers;
    G's first ``warm_up`` moves come before the game and minimise all but the first term; faint
    triggers of the whole image play like P with a weight and a rate of their own.

    The teacher stays in eval mode; the others train, so the student's BatchNorm statistics follow
    clean and patched batches, which pass separately, in all moves.

    Args:
        network: the suspect's network over normalised inputs; teacher and student are copies.
        std: per-channel deviation of the data (1, C, 1, 1): pixel units -> normalised units.
        trigger_network: None is the published control without it (data-free distillation, DFAD).
        faint_triggers: a second attacker, in the paper None.
        averaging: decay per iteration of an exponential average of the student, BatchNorm
            statistics included, which is the outcome then; 0, the paper's, takes the last student.
        noise: source of latents and patch places.
        epochs: length of the schedule.
        processes: that share every batch; each plays with its rows of the same noise.
    """

    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        std: Tensor,
        generator: ImageGenerator,
        trigger_network: TriggerNetwork | None,
        faint_triggers: FaintTriggers | None = None,
        noise: Noise,
        weights: LossWeights,
        rates: LearningRates,
        batch_size: int,
        student_moves: int,
        epochs: int,
        warm_up: int = 0,
        averaging: float = 0.0,
        processes: Processes | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.student = copy.deepcopy(network).requires_grad_(True)
        self.teacher = copy.deepcopy(network).requires_grad_(False)
        self.generator, self.trigger_network = generator, trigger_network
        self.faint_triggers = faint_triggers
        self.register_buffer("std", std.clone())
        self.noise, self.weights, self.rates = noise, weights, rates
        self.batch_size, self.student_moves, self.epochs = batch_size, student_moves, epochs
        self.warm_up = warm_up
        self.average = averaged(self.student, averaging) if averaging else None
        self.processes = processes or Processes()
        self._sums: dict[str, Tensor] = {}
        self._last_good: dict[str, Any] = {}
        self.diverged_at: int | None = None

    @property
    def purified(self) -> nn.Module:
        """The student, or the running average of its weights where the game keeps one."""
        outcome: nn.Module = self.student if self.average is None else self.average.module
        return outcome

    @property
    def networks(self) -> list[nn.Module]:
        """Student, teacher, generator and the trigger networks, in this order."""
        return [self.student, self.teacher, self.generator, *self.attackers.values()]

    @property
    def attackers(self) -> dict[str, TriggerNetwork | FaintTriggers]:
        """Active attackers by the names of their loss weights."""
        found = {"patch": self.trigger_network, "faint": self.faint_triggers}
        return {name: attacker for name, attacker in found.items() if attacker is not None}

    # ------------------------------------------------------------------ the algorithm

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One iteration: student moves, then one generator move, then one of each attacker."""
        del batch
        student, generator, *attackers = self._optimizers()
        if self.current_epoch == batch_idx == 0:
            for _ in range(self.warm_up):
                self._generator_move(generator, alone=True)
        for _ in range(self.student_moves):
            self._student_move(student)
        self._generator_move(generator)
        for name, optimizer in zip(self.attackers, attackers, strict=True):
            self._trigger_move(optimizer, name)
        if self.average is not None:
            self.average.update_parameters(self.student)

    def _student_move(self, optimizer: torch.optim.Optimizer) -> None:
        """The student copies the teacher and unlearns what a patch changes; G and P only serve."""
        begin_step()
        with torch.no_grad():
            x = self._images()
            teacher_logits = self.teacher(x)
            attacked = {name: self._attacked(x, name) for name in self.attackers}
        student_logits = self.student(x)
        loss = match = disagreement(student_logits, teacher_logits)
        for name, changed in attacked.items():
            change = disagreement(self.student(changed), student_logits.detach())
            loss = loss + getattr(self.weights, name) * change
            self._note(f"student/{name}", change)
        self._note("student/distill", match)
        self._descend(loss, optimizer)

    def _generator_move(self, optimizer: torch.optim.Optimizer, *, alone: bool = False) -> None:
        """The generator seeks images on which student and teacher disagree.

        Args:
            alone: leave out the student, which stays as it is, statistics included.
        """
        begin_step()
        with frozen(self.student):
            x = self._images()
            with self._statistics() as gaps:
                teacher_logits = self.teacher(x)
            terms = self._generator_terms(x, teacher_logits, gaps)
            if not alone:
                gap = disagreement(self.student(x), teacher_logits)
                self._note("generator/gap", gap)
                terms = [-gap, *terms]
            if terms:
                self._descend(functools.reduce(operator.add, terms), optimizer)

    def _generator_terms(
        self, x: Tensor, teacher_logits: Tensor, gaps: list[Tensor]
    ) -> list[Tensor]:
        """Terms of the generator's loss that do not depend on the student."""
        weights, terms = self.weights, []
        if weights.tv1:
            terms.append(weights.tv1 * total_variation_l1(x))
        if weights.tv2:
            norms = self.processes.all_reduce_norm(neighbour_norms(x))
            terms.append(weights.tv2 * norms.sum())
        if weights.balance:
            share = self.processes.all_reduce_mean(mean_prediction(teacher_logits))
            terms.append(weights.balance * imbalance(share))
        if gaps:
            terms.append(weights.statistics * torch.stack(gaps).mean())
        return terms

    def _statistics(self) -> AbstractContextManager[list[Tensor]]:
        """The teacher's ``statistics_gaps`` in its next pass, if they count."""
        if not self.weights.statistics:
            return nullcontext([])
        return statistics_gaps(self.teacher, self.processes)

    def _trigger_move(self, optimizer: torch.optim.Optimizer, name: str = "patch") -> None:
        """A trigger network seeks changes that move the student's logits."""
        begin_step()
        with frozen(self.student):
            with torch.no_grad():
                x = self._images()
                clean_logits = self.student(x)
            change = disagreement(clean_logits, self.student(self._attacked(x, name)))
            self._note("trigger/change" if name == "patch" else f"{name}/change", change)
            self._descend(-change, optimizer)

    def _images(self) -> Tensor:
        images: Tensor = self.generator(self._latent(self.generator.latent))
        return images

    def _latent(self, length: int) -> Tensor:
        """The rows of a batch that this process has of latents."""
        drawn = self.noise.latent(self.batch_size, length)
        return drawn[self.processes.rows(self.batch_size)]

    def _attacked(self, x: Tensor, name: str) -> Tensor:
        """``x`` as this attacker changes it."""
        attacker = self.attackers[name]
        return attacker.perturb(x, self.std, self._latent, self.noise.place)

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.processes.average_gradients([optimizer])
        optimizer.step()
        # One autocast region spans all moves, and its cache would keep the weights' low-precision
        # copies of before this step, or copies made under no_grad that pass on no gradient.
        torch.clear_autocast_cache()

    # ------------------------------------------------------------------ optimisers and schedule

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[MultiStepLR]]:
        """SGD for the student, Adam for the two generators, one schedule for all."""
        r = self.rates
        student = torch.optim.SGD(
            self.student.parameters(),
            lr=r.student,
            momentum=r.momentum,
            weight_decay=r.weight_decay,
            fused=True,
        )
        optimizers: list[torch.optim.Optimizer] = [
            student,
            torch.optim.Adam(self.generator.parameters(), lr=r.generator, fused=True),
        ]
        if self.trigger_network is not None:
            parameters = self.trigger_network.parameters()
            optimizers.append(torch.optim.Adam(parameters, lr=r.trigger_network, fused=True))
        if self.faint_triggers is not None:
            network, free = self.faint_triggers.network.parameters(), [self.faint_triggers.free]
            groups: list[dict[str, Any]] = [{"params": network}, {"params": free, "lr": r.faint}]
            optimizers.append(torch.optim.Adam(groups, lr=r.trigger_network, fused=True))
        milestones = [max(1, int(m * self.epochs)) for m in r.milestones]
        return optimizers, [MultiStepLR(o, milestones, r.decay) for o in optimizers]

    def _optimizers(self) -> list[Any]:
        found = self.optimizers()
        return found if isinstance(found, list) else [found]

    # ------------------------------------------------------------------ epochs

    def on_train_epoch_start(self) -> None:
        """Student, generator and trigger network train, the teacher does not; noise is reseeded."""
        self.train()
        self.teacher.eval()
        self.noise.set_epoch(self.current_epoch)

    def on_train_epoch_end(self) -> None:
        """Log the mean losses, stop on divergence, step the schedules."""
        count = len(self._sums) and self.trainer.num_training_batches
        means = {
            name: total / (count * (self.student_moves if name.startswith("student/") else 1))
            for name, total in self._sums.items()
        }
        self._sums.clear()
        self.processes.average(means.values())
        self.log_dict(means)
        if not self._healthy(means):
            return
        for scheduler in self._schedulers():
            scheduler.step()

    def _healthy(self, means: dict[str, Tensor]) -> bool:
        """Keep the student if all is finite; else restore the last one kept and stop.

        Raises:
            DivergenceError: the first epoch already diverged, so there is no good student.
        """
        state = self.purified.state_dict()
        weights = torch.stack([p.abs().max() for p in state.values()])
        if all(m.isfinite() for m in means.values()) and weights.isfinite().all():
            self._last_good = copy.deepcopy(state)
            return True
        self.diverged_at = self.current_epoch
        names = [n for n, m in means.items() if not m.isfinite()] or ["student weights"]
        message = f"the game diverged in epoch {self.current_epoch} (not finite: {names})"
        remedy = "lower defense.rates.student or defense.weights.patch"
        if not self._last_good:
            raise DivergenceError(f"{message}; {remedy}")
        log.warning("%s; the student of the epoch before is used; %s", message, remedy)
        self.purified.load_state_dict(self._last_good)
        self.trainer.should_stop = True
        return False

    def _note(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def _schedulers(self) -> list[Any]:
        found = self.lr_schedulers()
        return found if isinstance(found, list) else [found]

    @torch.no_grad()
    def sample(self, count: int, noise: Noise) -> tuple[Tensor, Tensor | None]:
        """Normalised images (count, C, H, W) and patches (count, C, p, p) in pixel units.

        Both come in training mode, with batch statistics, as the players see them; the running
        statistics are left as they were.
        """
        patches = None
        with eager(), preserved(self.generator):
            images = self.generator(noise.latent(count, self.generator.latent))
        if self.trigger_network is not None:
            with eager(), preserved(self.trigger_network):
                patches = self.trigger_network(noise.latent(count, self.trigger_network.latent))
        return images, patches
