"""Work of victims, of the game and of the defenses' trainings: ``python -m benchmarks.flops``.

Everything is counted on small batches and scaled, so no published setting has to be run. With
``--seconds`` steps are timed as well, on a CPU with smaller batches than published: then FLOP/s, on
a known GPU the share of its bf16 peak, and the time that the whole would take at that speed.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from benchmarks.game_speed import ours
from benchmarks.machine import DEVICE, about, now
from dhbe.config.resolvers import register_resolvers
from dhbe.config.schema import plain
from dhbe.core.paths import CONF
from dhbe.core.types import DataSpec, Suspect
from dhbe.data import DefenderData, Resident, TrainingBatches
from dhbe.game import ImageGenerator, TriggerNetwork
from dhbe.models import Normalized
from dhbe.models.interface import channels_last
from dhbe.report.folder import percent, si
from dhbe.training.resuming import LastEpoch
from dhbe.training.runtime import Runtime
from dhbe.training.supervised import Supervised
from dhbe.training.trainer import TrainerConfig
from dhbe.training.work import WINDOW, Counting, Work, peak

NETWORKS = ("resnet18", "preact_resnet18", "wrn_16_1", "vgg19_bn", "resnet_small")
DEFENSES = (
    *("finetune", "ft_sam", "nad", "anp", "rnp", "awm", "nft", "fip", "fast_fip", "i_bau", "aft"),
    *("fine_pruning", "ulrl"),
)
"""Those that mainly train; the searches of the others are no trainings and are not counted."""
IMAGES = 50_000
"""Of CIFAR-10's training part; ours trains on 95 % of it, the rest is the defender's."""
VICTIM, GAME = 128, 256
"""Published batch sizes."""
EPOCHS, ITERATIONS = 100, 300 * 50
"""Of BackdoorBench's victims; of the published game."""
SHRINK = 32
"""Images and batches of the defenses' trainings are so many times smaller, then scaled."""
CIFAR = DataSpec(
    name="cifar10",
    classes=10,
    channels=3,
    image_size=32,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    flip=True,
    crop_padding=4,
    balanced=True,
)


def config(*overrides: str) -> dict:
    """The composed config as plain values."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("config", overrides=list(overrides)))


def network(name: str) -> Normalized:
    """A fresh network of ``conf/model`` for CIFAR-10."""
    torch.manual_seed(0)
    built = instantiate(
        config(f"model={name}")["model"], classes=10, channels=3, image_size=32, _convert_="all"
    )
    return channels_last(Normalized(built, CIFAR).to(DEVICE))


def noise(count: int) -> Resident:
    """Random images with labels 0 to 9 in turn."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=rng, dtype=torch.uint8)
    return Resident(pixels, torch.arange(count) % 10)


class Timer(pl.Callback):
    """Seconds of the steps that are not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *args) -> None:
        self.start = now()

    def on_train_batch_end(self, *args) -> None:
        if not is_in_torch_dispatch_mode():
            self.seconds.append(now() - self.start)


def victim(name: str, batch: int, steps: int) -> tuple[pl.LightningModule, object]:
    """Supervised training and its batches."""
    images = noise(batch * steps)
    batches = TrainingBatches(images, spec=CIFAR, batch_size=batch, seed=0, device=DEVICE)
    schedule = instantiate(config("victim=backdoorbench")["victim"], _convert_="all")
    return Supervised(network(name), batches, schedule, role="victim"), batches


def game(name: str, batch: int, steps: int) -> tuple[pl.LightningModule, object]:
    """The game with the published players and constants, and its iterations."""
    suspect = network(name)
    generator = ImageGenerator(latent=256, width=64, channels=3, image_size=32)
    trigger = TriggerNetwork(latent=256, width=64, channels=3, patch_size=5)
    return ours(suspect.network, generator, trigger, suspect.std, batch, DEVICE), range(steps)


Training = Callable[[str, int, int], tuple[pl.LightningModule, object]]
"""(network, batch, steps) -> what Lightning needs for so many steps."""


def runtime(folder: str, kind: type[Runtime] = Runtime) -> Runtime:
    """In the fastest precision of this machine."""
    trainer = TrainerConfig(
        device="auto", precision="auto", threads=0, progress="never", observe_every=0, count=True
    )
    return kind(trainer_config=trainer, seed=0, workdir=Path(folder) / "work")


def step(training: Training, name: str, batch: int, timed: int = 0) -> Work:
    """FLOP and bytes of a step, and, of ``timed`` steps that are not counted, median seconds."""
    steps = WINDOW + 1 + timed if timed else 1
    timer = Timer()
    with TemporaryDirectory() as folder:
        own = runtime(folder)
        module, batches = training(name, batch, steps)
        own.fit(module, batches, epochs=1, callbacks=[timer])
    assert own.work_total.work is not None
    mean = Work().plus(own.work_total.work, 1 / steps)
    seconds = statistics.median(timer.seconds[1:]) if timed else 0.0
    return Work(flops=mean.flops, bytes=mean.bytes, seconds=seconds)


def scaled(training: Training, name: str, batch: int) -> Work:
    """Work of a step by those of 2 and 4 images: a part for the weights, a part per image."""
    two, four = (step(training, name, size) for size in (2, 4))
    return two.plus(four.plus(two, -1), (batch - 2) / 2)


def forward(name: str) -> Work:
    """Of one image, in inference."""
    built, image = network(name).eval(), torch.rand(1, 3, 32, 32, device=DEVICE)
    with Counting() as counting, torch.inference_mode():
        built(image)
    return counting.work


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """``steps`` of a training with ``batch`` images each, ``times`` over."""

    training: Training
    batch: int
    unit: str
    steps: int
    whole: str
    times: int


PROTOCOLS = (
    Protocol(
        training=victim,
        batch=VICTIM,
        unit="victim epoch",
        steps=IMAGES // VICTIM,
        whole="victim",
        times=EPOCHS,
    ),
    Protocol(
        training=game,
        batch=GAME,
        unit="DHBE iteration",
        steps=1,
        whole="published game",
        times=ITERATIONS,
    ),
)


def networks(names: list[str], timed: int, batch: int) -> None:
    """Table of passes, epochs, iterations and whole protocols.

    Args:
        timed: steps to time, of ``batch`` images on a CPU, of the published number on a GPU.
    """
    table("network", "what", "FLOP", "bytes", "measured", "whole at that speed")
    for name in names:
        image = forward(name)
        row(name, "forward pass of one image", si(image.flops), si(image.bytes), "", "")
        for p in PROTOCOLS:
            one = scaled(p.training, name, p.batch)
            units = one.flops / p.batch / image.flops
            once = Work().plus(one, p.steps)
            whole = Work().plus(once, p.times)
            measured = hours = ""
            if timed:
                size = p.batch if DEVICE.type == "cuda" else batch
                found = step(p.training, name, size, timed)
                speed, top = found.flops / found.seconds, peak(DEVICE)
                share = "" if top is None else f", {percent(speed / top)} of bf16 peak"
                measured = f"{found.seconds:.3f} s a step of {size}, {si(speed)}FLOP/s{share}"
                hours = f"{whole.flops / speed / 3600:.2f} h"
            what = f"{p.unit} ({units:.2f} forward passes per image)"
            row(name, what, si(once.flops), si(once.bytes), measured, "")
            row(name, f"{p.whole}: {p.times} times", si(whole.flops), si(whole.bytes), "", hours)


def table(*titles: str) -> None:
    """Print the head of a table."""
    row(*titles)
    row(*("---" for _ in titles))


def row(*cells: str) -> None:
    """Print a row."""
    print(f"| {' | '.join(cells)} |", flush=True)


class Skipping(Runtime):
    """Carries out the steps that are counted and skips those that they stand for."""

    def fit(self, module: pl.LightningModule, batches, **options) -> None:
        """A training of the published length in a few dozen steps."""
        step, end = module.training_step, module.on_train_epoch_end

        def sampled_step(batch, batch_idx: int):
            if is_in_torch_dispatch_mode():
                return step(batch, batch_idx)
            return None

        def sampled_end() -> None:
            if not module.current_epoch & (module.current_epoch - 1):
                end()

        module.training_step, module.on_train_epoch_end = sampled_step, sampled_end
        super().fit(module, batches, **options)


def shrunk(node):
    """A defense's config with smaller batches, and without an early end of unlearning."""
    if not isinstance(node, dict):
        return node
    small = {k: shrunk(v) for k, v in node.items()}
    if "batch_size" in small:
        small["batch_size"] = max(2, small["batch_size"] // SHRINK)
    return small | ({"stop_accuracy": -1.0} if "stop_accuracy" in small else {})


def trainings(defense: str, name: str) -> Work | None:
    """Of a defense's published config with its own budget, on random images."""
    tree = config(f"defense={defense}")
    grant = instantiate(tree["budget"], _convert_="all")
    built = instantiate(shrunk(tree["defense"]), _convert_="all")
    total = IMAGES // SHRINK
    data = DefenderData(
        grant,
        pool=noise(total // 20),
        train_size=total,
        seed=0,
        poisoned=noise(total) if grant.poisoned else None,
    )
    suspect = Suspect(network=network(name).eval(), architecture=name, spec=CIFAR)
    with TemporaryDirectory() as folder:
        own = runtime(folder, Skipping)
        built(suspect, data, own)
    return own.work_total.work and Work().plus(own.work_total.work, SHRINK)


def defenses(names: list[str], name: str) -> None:
    """Table of the trainings of defenses."""
    print()
    table(f"trainings of, on {name}", "budget", "FLOP", "bytes", "published games")
    yardstick = ITERATIONS * scaled(game, name, GAME).flops
    for defense in names:
        budget = config(f"defense={defense}")["budget"]["name"]
        work = trainings(defense, name)
        cells = ("–",) * 3
        if work is not None:
            cells = (si(work.flops), si(work.bytes), f"{work.flops / yardstick:.4f}")
        row(defense, budget, *cells)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--defenses", nargs="*", default=list(DEFENSES))
    parser.add_argument("--suspect", default="resnet18", help="the defenses' network")
    parser.add_argument("--seconds", type=int, default=0, metavar="N", help="time N steps of each")
    parser.add_argument("--batch", type=int, default=16, help="of timed steps on a CPU")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    LastEpoch.on_train_epoch_end = lambda *_: None  # nothing here is worth a checkpoint
    print(f"{about()}\nFLOP: multiply-add 2. Bytes: in and out of operators, an upper bound.\n")
    if options.networks:
        networks(options.networks, options.seconds, options.batch)
    if options.defenses:
        defenses(options.defenses, options.suspect)


if __name__ == "__main__":
    main()
