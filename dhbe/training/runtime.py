"""How a run computes: device, precision, random streams, Lightning trainer, and what it records."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.loggers import Logger
from torch import nn

from dhbe.core.rng import derive_seed, generator
from dhbe.training.compile import compiled, recomputed
from dhbe.training.parallel import align, first, synchronised
from dhbe.training.recorder import LastEpoch, Recorder, Stopwatch
from dhbe.training.trainer import TrainerConfig
from dhbe.training.work import Tally, WorkCounter

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Runtime:
    """Everything a stage needs to compute, and nothing it may not see.

    Attributes:
        workdir: holds the checkpoint of the stage while it runs.
        recorder: takes curves and pictures; it gives nothing back.
        stopwatch: keeps the seconds of the whole stage, whatever trainings it consists of.
        tally: keeps the work of its trainings; what else a stage computes is not counted.
        weights_only: whether a defense may change weights alone, because other code will load them.
    """

    trainer_config: TrainerConfig
    seed: int
    workdir: Path
    recorder: Recorder = field(default_factory=Recorder)
    logger: Logger | None = None
    stopwatch: Stopwatch | None = None
    tally: Tally = field(default_factory=Tally)
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
            networks: parts worth compiling and recomputing, if so configured.
        """
        config = self.trainer_config
        self.workdir.mkdir(parents=True, exist_ok=True)
        checkpoint = self.workdir / "last.ckpt"
        saver = LastEpoch(checkpoint, self.stopwatch)
        counter = WorkCounter()
        hooks: list[Callback] = [counter, *callbacks, self.recorder, saver]
        if config.progress and first():
            hooks.append(RichProgressBar(leave=True))
        logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning")
            warnings.filterwarnings("ignore", message="The `srun` command")  # Slurm's login nodes
            trainer = self._trainer(hooks, epochs)
            align(module)
            try:
                with (
                    synchronised(module),
                    compiled(networks, config.compile),
                    recomputed(networks, config.recompute),
                ):
                    trainer.fit(
                        module,
                        train_dataloaders=batches,
                        ckpt_path=str(checkpoint) if checkpoint.exists() else None,
                        weights_only=True,
                    )
            except SystemExit as stopped:
                if stopped.code != 1:
                    raise
                # Lightning makes exit status 1 of Ctrl-C, and ignores the next one.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                raise KeyboardInterrupt from stopped
            finally:
                counter.stop()
        self.tally.add(counter.work)
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
            enable_progress_bar=config.progress and first(),
            enable_model_summary=False,
            plugins=LightningEnvironment(),  # one process, also inside a Slurm job
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
        )
