"""Players of the game, small enough to compare by value."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytorch_lightning as pl
import torch
from torch import nn

from dhbe.game import (
    Distillation,
    FaintTriggers,
    ImageGenerator,
    LearningRates,
    LossWeights,
    Noise,
    TriggerNetwork,
)
from dhbe.models.preact import WideResNet

CPU = torch.device("cpu")


STD = torch.tensor([0.2023, 0.1994, 0.2010], dtype=torch.float64).view(1, 3, 1, 1)

BATCH, LATENT = 4, 8

PUBLISHED_WEIGHTS = LossWeights(
    patch=0.1, faint=0.0, tv1=0.0, tv2=1e-4, balance=0.0, statistics=0.0
)
PUBLISHED_RATES = LearningRates(
    student=0.1,
    generator=1e-3,
    trigger_network=1e-3,
    faint=0.2,
    momentum=0.9,
    weight_decay=5e-4,
    milestones=(0.6, 0.8),
    decay=0.1,
)


def players(dtype: torch.dtype = torch.float64, size: int = 16):
    torch.manual_seed(0)
    network = WideResNet(depth=10, widen=1, classes=5, channels=3, image_size=size)
    generator = ImageGenerator(latent=LATENT, width=4, channels=3, image_size=size)
    trigger = TriggerNetwork(latent=LATENT, width=4, channels=3, patch_size=3)
    return [m.to(dtype) for m in (network, generator, trigger)]


def make_game(
    network: nn.Module,
    generator: ImageGenerator,
    trigger: TriggerNetwork | None,
    noise: Noise,
    *,
    epochs: int = 1,
    student: float = 0.1,
    moves: int = 5,
    tv1: float = 0.0,
    statistics: float = 0.0,
    faint: FaintTriggers | None = None,
    warm_up: int = 0,
    averaging: float = 0.0,
) -> Distillation:
    return Distillation(
        network,
        std=STD.to(next(network.parameters()).dtype),
        generator=copy.deepcopy(generator),
        trigger_network=copy.deepcopy(trigger),
        faint_triggers=copy.deepcopy(faint),
        warm_up=warm_up,
        averaging=averaging,
        noise=noise,
        weights=replace(PUBLISHED_WEIGHTS, faint=0.3, tv1=tv1, statistics=statistics),
        rates=replace(PUBLISHED_RATES, student=student),
        batch_size=BATCH,
        student_moves=moves,
        epochs=epochs,
    )


def play(game: Distillation, *, iterations: int, epochs: int = 1, **options) -> pl.Trainer:
    settings = {"enable_checkpointing": False, "precision": "64-true"} | options
    checkpoint = settings.pop("ckpt_path", None)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(game, range(iterations), ckpt_path=checkpoint, weights_only=True)
    return trainer


def assert_same(ours: nn.Module, theirs: nn.Module, tolerance: float) -> None:
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        difference = float((a[key].double() - b[key].double()).abs().max())
        assert difference <= tolerance, f"{key} differs by {difference}"
