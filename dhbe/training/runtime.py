"""Runtime of a run: device, precision, random streams, Lightning trainer, recorder."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn
from typing_extensions import Unpack

from dhbe.core.rng import derive_seed, generator
from dhbe.core.types import DataSpec
from dhbe.data import ImageSet, TrainingBatches, to_float
from dhbe.training.compile import compiled
from dhbe.training.parallel import Processes
from dhbe.training.progress import StageBar
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.resuming import LastEpoch, newest
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Options, Supervised
from dhbe.training.trainer import TrainerConfig
from dhbe.training.work import WorkCounter, WorkTotal

log = logging.getLogger(__name__)
BATCH = 500
"""Images per pass without gradients."""


def call(network: nn.Module, x: Tensor) -> Tensor:
    """``network(x)``: outputs (B, classes) for images (B, C, H, W)."""
    out: Tensor = network(x)
    return out


@dataclass(kw_only=True)
class Runtime:
    """Computing environment of a stage, without access to data.

    Attributes:
        workdir: holds the checkpoint of the stage while it runs.
        recorder: takes curves and pictures; it gives nothing back.
        stopwatch: keeps the seconds of the whole stage, whatever trainings it consists of.
        work_total: keeps the work of its trainings, with ``trainer.count``; what else a stage
            computes is not counted.
        processes: that share the trainings.
        weights_only: whether a defense may change weights alone, because other code will load them.
    """

    trainer_config: TrainerConfig
    seed: int
    workdir: Path
    recorder: Recorder = field(default_factory=Recorder)
    logger: Logger | None = None
    stopwatch: Stopwatch | None = None
    work_total: WorkTotal = field(default_factory=WorkTotal)
    processes: Processes = field(default_factory=Processes)
    weights_only: bool = False

    @property
    def device(self) -> torch.device:
        """Where tensors live."""
        return self.trainer_config.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of weights and images."""
        return torch.float64 if self.trainer_config.precision == "64-true" else torch.float32

    def rng(self, *purpose: object, device: torch.device | str = "cpu") -> torch.Generator:
        """Generator derived from the run's seed and a purpose."""
        return generator(self.seed, *purpose, device=device)

    def derive(self, *purpose: object) -> int:
        """Integer seed derived from the run's seed and a purpose."""
        return derive_seed(self.seed, *purpose)

    def autocast(self) -> torch.autocast:
        """Context with the run's precision, for passes that Lightning does not make."""
        mixed = self.trainer_config.precision == "bf16-mixed"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=mixed)

    def stage(self, name: str) -> Runtime:
        """The same run for a training of its own inside a stage, with its own checkpoint."""
        return replace(self, workdir=self.workdir / name, recorder=Recorder())

    # ------------------------------------------------------------------ images

    def tensor(self, images: ImageSet) -> Tensor:
        """All images (N, C, H, W) in [0, 1], on the device and in the precision of the run."""
        return self.pixels(images.resident().images)

    def pixels(self, raw: Tensor) -> Tensor:
        """uint8 images (N, C, H, W) as floats in [0, 1], on the device, in the run's dtype."""
        return to_float(raw.to(self.device)).to(self.dtype)

    def labels(self, images: ImageSet) -> Tensor:
        """All labels (N,) int64, on the device of the run."""
        return images.labels.to(self.device)

    @torch.no_grad()
    def forward(
        self,
        network: nn.Module,
        images: ImageSet,
        through: Callable[[nn.Module, Tensor], Tensor] = call,
    ) -> Tensor:
        """Outputs of a network for all images, in eval mode (N, ...); its mode stays as it was.

        In full precision, or in that of an ``autocast`` around the call.

        Args:
            through: gives the outputs of a batch; default: the network's own.
        """
        training = network.training
        network.eval()
        order = torch.arange(len(images))
        parts = [
            through(network, self.pixels(raw)).to(self.dtype)
            for raw, _ in images.batches(order, BATCH)
        ]
        network.train(training)
        return torch.cat(parts)

    def batches(
        self,
        images: ImageSet,
        *,
        spec: DataSpec,
        batch_size: int,
        purpose: str,
        steps: int | None = None,
    ) -> TrainingBatches:
        """Batches as ``train`` makes them, for a pass beside a training.

        Args:
            purpose: names the random stream.
            steps: batches per epoch, drawn with replacement; None: each image once.
        """
        return TrainingBatches(
            images,
            spec=spec,
            batch_size=batch_size,
            seed=self.derive(purpose),
            device=self.device,
            dtype=self.dtype,
            steps=steps,
        )

    # ------------------------------------------------------------------ trainings

    def train(
        self,
        network: nn.Module,
        images: ImageSet,
        schedule: Schedule,
        *,
        purpose: str,
        role: str = "student",
        spec: DataSpec | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
        callbacks: Sequence[Callback] = (),
        **options: Unpack[Options],
    ) -> None:
        """Train a network in place; the last epoch is kept, whatever its accuracy.

        Args:
            images: with the labels to train on.
            purpose: names the random stream of order, augmentation and what the loss draws.
            role: who is trained; the logged loss is ``<role>/loss``.
            spec: says how to augment; default: the network's own.
            batch_size: another one than the schedule's.
            steps: batches per epoch, drawn with replacement; None: each image once.
            callbacks: Lightning's.
            options: see ``Options``.

        Raises:
            DivergenceError: a mean loss is not finite.
        """
        found = spec or getattr(network, "spec", None)
        assert isinstance(found, DataSpec), "a network that does not know its data needs spec="
        batches = self.batches(
            images,
            spec=found,
            batch_size=batch_size or schedule.batch_size,
            purpose=purpose,
            steps=steps,
        )
        module = Supervised(
            network, batches, schedule, role=role, processes=self.processes, **options
        )
        self.fit(module, batches, epochs=schedule.epochs, callbacks=callbacks)

    def fit(
        self,
        module: pl.LightningModule,
        batches: Any,
        *,
        epochs: int,
        callbacks: Sequence[Callback] = (),
        networks: Sequence[nn.Module] = (),
    ) -> None:
        """Train with Lightning; continue from the workdir's checkpoint if there is one.

        Args:
            callbacks: run before the recorder, whose row they may add to.
            networks: parts worth compiling, if so configured.
        """
        config = self.trainer_config
        self.workdir.mkdir(parents=True, exist_ok=True)
        state = self.processes.agree(newest(self.workdir) if self.processes.first else None)
        saver = LastEpoch(self.workdir, self.stopwatch, writes=self.processes.first)
        counter = WorkCounter(self.processes.count) if config.count else None
        hooks: list[Callback] = [*([counter] if counter else []), *callbacks, self.recorder, saver]
        if config.progress and self.processes.first:
            hooks.append(StageBar(self.recorder))
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", message="The `srun` command")  # Slurm's login nodes
            trainer = self._trainer(hooks, epochs)
            self.processes.align(module)
            try:
                with self.processes.synchronised(module), compiled(networks, config.compile):
                    trainer.fit(
                        module,
                        train_dataloaders=batches,
                        ckpt_path=None if state is None else str(state),
                        weights_only=True,
                    )
            except SystemExit as stopped:
                if stopped.code != 1:
                    raise
                # Lightning makes exit status 1 of Ctrl-C, and ignores the next one.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from stopped
            finally:
                if counter is not None:
                    counter.stop()
        if counter is not None:
            self.work_total.add(counter.work)
        module.to(config.device)

    def _trainer(self, hooks: list[Callback], epochs: int) -> pl.Trainer:
        config = self.trainer_config
        return pl.Trainer(
            accelerator="gpu" if config.device.type == "cuda" else "cpu",
            devices=1 if config.device.index is None else [config.device.index],
            precision=config.precision,
            max_epochs=epochs,
            callbacks=hooks,
            logger=self.logger or False,
            enable_progress_bar=config.progress and self.processes.first,
            enable_model_summary=False,
            plugins=LightningEnvironment(),  # one process, also inside a Slurm job
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
