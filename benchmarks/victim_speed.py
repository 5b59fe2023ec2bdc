"""Seconds per victim epoch, ours against a plain loop: ``python -m benchmarks.victim_speed``.

The loop is what tutorials and most backdoor code do: PIL images through torchvision's transforms in
worker processes, fp32, channels first. Both train the same network from the same weights with the
same batch and schedule, an epoch each in turn in one process; the median of all epochs but the
first is compared, and the accuracy that both reach.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.flops import config
from benchmarks.machine import DEVICE, about, now
from dhbe.config.identity import fingerprint
from dhbe.core.types import DataSpec
from dhbe.data import Resident, TrainingBatches, load
from dhbe.evaluation.evaluator import Evaluator
from dhbe.experiment.assembly import assemble
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import SGDSchedule
from dhbe.training.supervised import Supervised
from dhbe.victim.source import build_network
from dhbe.victim.train import TrainedVictim


class Pictures(Dataset):
    """(transformed PIL image, label), one at a time."""

    def __init__(self, images: Resident, transform) -> None:
        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = images.labels.tolist(), transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[place])), self.labels[place]


class PlainLoop:
    """The loop; ``epoch`` is one epoch of it.

    Args:
        network: over normalised images.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Resident,
        spec: DataSpec,
        schedule: SGDSchedule,
        workers: int,
    ) -> None:
        self.network = network.to(DEVICE).to(memory_format=torch.contiguous_format)
        chain = [
            transforms.RandomCrop(spec.image_size, padding=spec.crop_padding),
            transforms.RandomHorizontalFlip(p=0.5 if spec.flip else 0.0),
            transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ]
        self.batches: DataLoader = DataLoader(
            Pictures(images, transforms.Compose(chain)),
            batch_size=schedule.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=workers,
            pin_memory=DEVICE.type == "cuda",
        )
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=schedule.learning_rate,
            momentum=schedule.momentum,
            nesterov=schedule.nesterov,
            weight_decay=schedule.weight_decay,
        )
        steps = schedule.epochs * len(self.batches)
        self.rate = LambdaLR(self.optimizer, lambda s: schedule.factor((s + 0.5) / steps))

    def epoch(self) -> float:
        """Train on all batches once; returns the mean loss."""
        self.network.train()
        total = 0.0
        for images, labels in self.batches:
            loss = F.cross_entropy(self.network(images.to(DEVICE)), labels.to(DEVICE))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.rate.step()
            total += loss.item()
        return total / len(self.batches)


class Turns(pl.Callback):
    """After each of our epochs one of the loop's, both timed."""

    def __init__(self, loop: PlainLoop) -> None:
        self.loop = loop
        self.ours: list[float] = []
        self.theirs: list[float] = []

    def on_train_epoch_start(self, *args) -> None:
        self.start = now()

    def on_train_epoch_end(self, *args) -> None:
        self.ours.append(now() - self.start)
        start = now()
        with torch.autocast(DEVICE.type, enabled=False), torch.enable_grad():
            self.loop.epoch()
        self.theirs.append(now() - start)
        print(f"epoch {len(self.ours)}: {self.ours[-1]:.2f} s, {self.theirs[-1]:.2f} s", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="cifar10_mini", help="cifar10 needs DHBE_DATA")
    parser.add_argument("--victim", default="cpu", help="network and schedule, of conf/victim")
    parser.add_argument("--epochs", type=int, default=6, help="length of the schedule, both train")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("overrides", nargs="*", help="such as trainer.precision=32-true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    chosen = [f"data={options.data}", f"victim={options.victim}", "attack=none"]
    tree = config(*chosen, f"victim.epochs={options.epochs}", *options.overrides)
    parts = assemble(tree)
    assert isinstance(parts.source, TrainedVictim)
    spec, schedule = parts.spec, parts.source.schedule
    assert isinstance(schedule, SGDSchedule)
    splits = load(parts.data, fingerprint(tree["data"]))
    network = build_network(tree, spec, seed=0).to(DEVICE)
    images = splits.train.resident()
    plain = copy.deepcopy(network)
    loop = PlainLoop(plain.network, images, spec, schedule, options.workers)
    turns = Turns(loop)
    print(
        f"{about()}; {len(images)} images, batch {schedule.batch_size}, {options.workers} workers"
    )
    batches = TrainingBatches(
        images.to(DEVICE), spec=spec, batch_size=schedule.batch_size, seed=0, device=DEVICE
    )
    module = Supervised(network, batches, schedule, role="victim")
    with TemporaryDirectory() as folder:
        own = Runtime(trainer_config=parts.trainer, seed=0, workdir=Path(folder) / "work")
        own.fit(module, batches, epochs=schedule.epochs, callbacks=[turns], networks=[network])
    ours, theirs = (statistics.median(v[1:] or v) for v in (turns.ours, turns.theirs))
    found = []
    for net in (network, plain.to(DEVICE)):
        answers = Evaluator(splits.test, None, device=DEVICE).predict(net.eval())
        found.append(100 * (answers.clean == splits.test.labels.numpy()).mean())
    print(
        f"ours ({parts.trainer.precision}) {ours:.2f} s, ACC {found[0]:.1f} %; plain loop (fp32) "
        f"{theirs:.2f} s, ACC {found[1]:.1f} %; ratio {theirs / ours:.2f} "
        f"(medians of {len(turns.ours) - 1} epochs)"
    )


if __name__ == "__main__":
    main()
