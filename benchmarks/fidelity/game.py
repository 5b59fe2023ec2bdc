"""The game of DHBE, and data-free distillation without trigger network."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from benchmarks.fidelity.official import Official, compare
from benchmarks.fidelity.ours import Given, apart, defense, network, runtime, weights
from dhbe.game.noise import ScriptedNoise

SIZE = {"batch_size": 6, "latent": 8, "width": 4, "patch_latent": 8, "patch_width": 4}
GENERATORS = "DHBE/gan.py: GeneratorB, PatchGeneratorBase, PatchGenerator, PatchGeneratorPreBN"
PRIORS = "DHBE/my_utils.py: get_image_prior_losses_l1, get_image_prior_losses_l2"


def same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """Give the authors' network our weights, in order of definition."""
    values = zip(theirs.state_dict().values(), ours.state_dict().values(), strict=True)
    for into, value in values:
        into.copy_(value.view_as(into))


class Moves:
    """Our game without Lightning: the same draws as the authors' loop after the same seeds."""

    def __init__(self, name: str, iterations: int, patches: bool, **options: Any) -> None:
        net = network((8,))
        method = defense(name, **SIZE, **options)
        with patch("defenses.dhbe.natural_inputs", return_value=None):  # as for CIFAR-10
            self.game = method.game(net, runtime(Given()))
        torch.manual_seed(0)
        np.random.seed(0)
        drawn = [torch.randn(6, 8) for _ in range(iterations * (13 if patches else 6))]
        places = [tuple(np.random.randint(0, 28, 2)) for _ in range(6 * iterations)]
        self.game.noise = ScriptedNoise(drawn, [(int(a), int(b)) for a, b in places])
        self.start = copy.deepcopy(self.game)
        self.weights, self.rates = method.weights, method.rates

    def play(self, iterations: int) -> None:
        """In place."""
        game = self.game
        optimizers, _ = game.configure_optimizers()
        game._optimizers = lambda: optimizers
        game.manual_backward = lambda loss: loss.backward()
        game.train()
        game.teacher.eval()
        for step in range(iterations):
            game.training_step(None, step + 1)

    def optimizers(self, student: nn.Module, *others: nn.Module) -> list[Any]:
        """The authors' ones."""
        r = self.rates
        kind = {"weight_decay": r.weight_decay, "momentum": r.momentum}
        found: list[Any] = [torch.optim.SGD(student.parameters(), lr=r.student, **kind)]
        return found + [torch.optim.Adam(n.parameters(), lr=r.generator) for n in others]


@compare("dhbe", "DHBE/DHBE_train.py: train", GENERATORS, PRIORS)
def dhbe(official: Official) -> float:
    """Weights of student, generator and trigger network after two iterations of 5 + 1 + 1 moves"""
    moves = Moves("dhbe", 2, patches=True)
    start = moves.start
    moves.play(2)
    student = copy.deepcopy(start.student)
    generator = official.GeneratorB(nz=8, ngf=4, nc=3, img_size=32)
    trigger = official.PatchGeneratorPreBN(nz=8, ngf=4, nc=3, patch_size=5, out_size=32)
    same_weights(start.generator, generator)
    same_weights(start.trigger_network, trigger)
    official.space["utils"] = official
    args = SimpleNamespace(
        epoch_itrs=2, batch_size=6, nz=8, nz2=8, log_interval=9, loss_weight_d1=0.1,
        loss_weight_tvl1=0.0, loss_weight_tvl2=1e-4,
    )  # fmt: skip
    torch.manual_seed(0)
    np.random.seed(0)
    official.train(
        args, start.teacher, student, generator, trigger,
        lambda x: (x - 0.5) / 0.5, lambda x: x * 0.5 + 0.5,
        moves.optimizers(student, generator, trigger), 1,
    )  # fmt: skip
    ours = [moves.game.student, moves.game.generator, moves.game.trigger_network]
    pairs = zip(ours, (student, generator, trigger), strict=True)
    return max(apart(weights(a), weights(b)) for a, b in pairs)


@compare(
    "dfad",
    "Data-Free-Adversarial-Distillation/DFAD_cifar.py: train",
    "Data-Free-Adversarial-Distillation/network/gan.py: GeneratorA",
)
def dfad(official: Official) -> float:
    """Weights of student and generator after two iterations of 5 + 1 moves"""
    moves = Moves("dfad", 2, patches=False)
    start = moves.start
    moves.play(2)
    student = copy.deepcopy(start.student)
    generator = official.GeneratorA(nz=8, ngf=4, nc=3, img_size=32)
    same_weights(start.generator, generator)
    official.space["vp"] = SimpleNamespace(add_scalar=lambda *_: None)
    args = SimpleNamespace(epoch_itrs=2, batch_size=6, nz=8, log_interval=9)
    torch.manual_seed(0)
    made = moves.optimizers(student, generator)
    official.train(args, start.teacher, student, generator, "cpu", made, 1)
    pairs = ((moves.game.student, student), (moves.game.generator, generator))
    return max(apart(weights(a), weights(b)) for a, b in pairs)
