"""Seconds per DHBE iteration, ours against the literal loop: ``python -m benchmarks.game_speed``.

Both play interleaved in one process, so that a noisy machine slows them alike; medians are
compared. Network width and generator are the published ones; only the batch is small.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from typing import get_args

import pytorch_lightning as pl
import torch

from dhbe.core.provenance import commit
from dhbe.game import Distillation, ImageGenerator, SeededNoise, TriggerNetwork
from dhbe.models.preact import WideResNet
from dhbe.models.resnet import resnet
from dhbe.training.compile import Compile, compiled
from dhbe.training.trainer import fast_bf16
from tests.support.game import PUBLISHED_RATES, PUBLISHED_WEIGHTS
from tests.support.literal import literal_copy

CASES = {
    "wrn_16_1": (64, lambda: WideResNet(depth=16, widen=1, classes=10, channels=3, image_size=32)),
    "resnet18": (16, lambda: resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32)),
}


def ours(network, generator, trigger, std, batch, device, epochs=1):
    """The project's game with the published constants."""
    game = Distillation(
        network,
        std=std,
        generator=generator,
        trigger_network=trigger,
        noise=SeededNoise(0, device=device, dtype=torch.float32),
        weights=PUBLISHED_WEIGHTS,
        rates=PUBLISHED_RATES,
        batch_size=batch,
        student_moves=5,
        epochs=epochs,
    )
    return game.to(device).to(memory_format=torch.channels_last)


class Interleaved(pl.Callback):
    """After each of our iterations, time one literal iteration."""

    def __init__(self, literal, device):
        self.literal, self.device = literal, device
        self.ours, self.theirs = [], []

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_batch_start(self, *args):
        self.start = self._now()

    def on_train_batch_end(self, *args):
        self.ours.append(self._now() - self.start)
        start = self._now()
        with torch.autocast(self.device.type, enabled=False):
            self.literal.iterate()
        self.theirs.append(self._now() - start)


def measure(
    name: str, iterations: int, precision: str, compile: Compile, device: torch.device
) -> None:
    """Print medians and their ratio for one network."""
    batch, build = CASES[name]
    torch.manual_seed(0)
    network = build().to(device)
    generator = ImageGenerator(latent=256, width=64, channels=3, image_size=32).to(device)
    trigger = TriggerNetwork(latent=256, width=64, channels=3, patch_size=5).to(device)
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=device).view(1, 3, 1, 1)
    std = torch.tensor([0.2023, 0.1994, 0.2010], device=device).view(1, 3, 1, 1)
    noise = SeededNoise(0, device=device, dtype=torch.float32)
    literal = literal_copy(
        network, generator, trigger, mean=mean, std=std, noise=noise, batch_size=batch
    )
    timer = Interleaved(literal, device)
    game = ours(network, generator, trigger, std, batch, device)
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        callbacks=[timer],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with compiled(game.networks, compile):
        trainer.fit(game, range(iterations + 1))
    a, b = (statistics.median(times[1:]) for times in (timer.ours, timer.theirs))
    print(
        f"{name:10} batch {batch:4} {precision:10} compile={compile} "
        f"ours {a:.3f} s  literal {b:.3f} s  ratio {b / a:.2f}  (n={iterations})",
        flush=True,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=7)
    parser.add_argument("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto")
    parser.add_argument("--compile", choices=get_args(Compile), default="never")
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = options.precision
    if precision == "auto":
        precision = "bf16-mixed" if fast_bf16(device) else "32-true"
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"torch {torch.__version__}, {device}, {platform.machine()} {capability}, "
        f"{torch.get_num_threads()} threads, commit {commit()}"
    )
    for name in options.networks:
        measure(name, options.iterations, precision, options.compile, device)


if __name__ == "__main__":
    main()
