"""How a run computes: device, precision, random streams, Lightning trainer, and what it records."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch
from annotated_types import Ge
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback, Checkpoint, RichProgressBar
from pytorch_lightning.loggers import Logger
from torch import Tensor, nn

from dhbe.acceleration import Compile, compiled, eager, recomputed
from dhbe.counting import Tally, WorkCounter
from dhbe.errors import got
from dhbe.processes import align, first, synchronised
from dhbe.rng import derive_seed, generator

log = logging.getLogger(__name__)
Precision = Literal["auto", "32-true", "64-true", "bf16-mixed"]


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; emulated on a CPU it is many times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, c, lambda: False)() for c in checks)


class Recorder(Checkpoint):
    """Curves and pictures of one stage; travels with the checkpoint, so a resumed run keeps them.

    A ``Checkpoint`` in Lightning's eyes, because those run after the module has logged its epoch.

    Args:
        observe: measures the network being trained (evaluation's eyes; nothing flows back).
        every: epochs between two observations; 0 switches them off.
    """

    def __init__(
        self, observe: Callable[[nn.Module], dict[str, float]] | None = None, every: int = 0
    ) -> None:
        self.rows: list[dict[str, float]] = []
        self.pictures: dict[str, np.ndarray] = {}
        self.notes: list[str] = []
        self.suspected: list[int] | None = None
        self._observe, self._every = observe, every

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether this epoch is one to observe (every n-th, and the last)."""
        return bool(self._every) and ((epoch + 1) % self._every == 0 or epoch + 1 == epochs)

    def observe(self, network: nn.Module, epoch: int) -> None:
        """Measure ``network`` and add the figures to this epoch's row."""
        if self._observe is None:
            return
        training = {m: m.training for m in network.modules()}
        with eager():
            figures = self._observe(network.eval())
        for module, mode in training.items():
            module.training = mode
        self.add(epoch, {f"val/{k}": v for k, v in figures.items()})

    def add(self, epoch: int, figures: dict[str, float]) -> None:
        """Add figures to the row of an epoch (counted from 0)."""
        if not self.rows or self.rows[-1]["epoch"] != epoch:
            self.rows.append({"epoch": epoch})
        self.rows[-1].update(figures)

    def suspect(self, classes: Sequence[int], how: str) -> None:
        """Keep the classes that a detector takes for targets (none, if it finds no backdoor).

        Args:
            how: method and details, for the note.
        """
        self.suspected = sorted(classes)
        self.notes.append(f"{how}: suspicious classes {self.suspected}")

    def picture(self, name: str, images: Tensor) -> None:
        """Keep images (N, C, H, W) in [0, 1] under a name; values outside are clipped."""
        pixels = images.detach().float().clamp(0, 1).mul(255).round()
        self.pictures[name] = pixels.to(torch.uint8).cpu().numpy()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Copy what the module logged in this epoch; tell its logger what was observed."""
        logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
        self.add(trainer.current_epoch, logged)
        observed = {k: v for k, v in self.rows[-1].items() if k.startswith("val/")}
        if trainer.logger and observed:
            trainer.logger.log_metrics(observed, step=trainer.fit_loop.total_batch_idx)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        pictures = {k: torch.from_numpy(v) for k, v in self.pictures.items()}
        kept = {"rows": self.rows, "notes": self.notes, "suspected": self.suspected}
        return {**kept, "pictures": pictures}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.rows, self.notes = state_dict["rows"], state_dict["notes"]
        self.suspected = state_dict["suspected"]
        self.pictures = {k: v.numpy() for k, v in state_dict["pictures"].items()}


class Stopwatch:
    """Seconds of a stage since it began, those of its killed attempts included.

    What an attempt did after its last finished epoch is not counted.

    Args:
        folder: where the stage keeps its checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self.start = folder / "seconds", time.perf_counter()
        self.earlier = float(self.file.read_text()) if self.file.exists() else 0.0

    @property
    def seconds(self) -> float:
        """So far."""
        return self.earlier + time.perf_counter() - self.start

    def save(self) -> None:
        """For the attempt that comes after a kill."""
        fresh = self.file.with_suffix(".new")
        fresh.write_text(str(self.seconds))
        fresh.replace(self.file)


class LastEpoch(Checkpoint):
    """Saves the state of the last finished epoch, in one step, after the recorder has its row.

    Lightning's own ModelCheckpoint with ``save_top_k=0`` writes nothing before training ends.
    """

    def __init__(self, path: Path, stopwatch: Stopwatch | None) -> None:
        self.path, self.stopwatch = path, stopwatch

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write beside the file, then rename: a kill never leaves half a checkpoint."""
        if not first():
            return
        fresh = self.path.with_suffix(".new")
        trainer.save_checkpoint(fresh)
        fresh.replace(self.path)
        if self.stopwatch is not None:
            self.stopwatch.save()


class TrainerConfig:
    """The ``trainer`` config group.

    Args:
        device: ``auto`` takes a GPU if there is one.
        precision: ``auto`` is bf16-mixed where the hardware has it, else 32-true.
        threads: CPU threads (0: torch's own choice).
        progress: ``auto`` draws progress bars on a terminal only.
        observe_every: epochs between two measurements for the training curves (0: none).
        processes: that share every batch of a training, on one GPU each where there are any.
        tf32: on a GPU, round factors of float32 products to 10 bits of mantissa: several times
            faster, another rounding. Nothing in bf16-mixed needs it, and a CPU does not have it.
        compile: ``torch.compile`` what is trained: the victim, the players of the game.
            ``reduce-overhead`` also replays CUDA graphs.
        recompute: in the same trainings, keep only the inputs of residual blocks and compute the
            rest again in the backward pass: less memory, a third more time, the same numbers.
    """

    def __init__(
        self,
        *,
        device: Literal["auto", "cpu", "cuda"],
        precision: Precision,
        threads: Annotated[int, Ge(0)],
        progress: Literal["auto", "always", "never"],
        observe_every: Annotated[int, Ge(0)],
        processes: Annotated[int, Ge(1)] = 1,
        tf32: bool = False,
        compile: Compile = "never",
        recompute: bool = False,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise got("trainer.device", device, "cpu or auto", "torch sees no CUDA device here")
        if recompute and compile != "never":
            raise got("trainer.recompute", recompute, f"false with trainer.compile={compile}")
        name = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        self.processes = processes
        if processes > 1 and name == "cuda":
            if processes > torch.cuda.device_count():
                allowed = f"at most {torch.cuda.device_count()}, the GPUs here"
                raise got("trainer.processes", processes, allowed, "or set trainer.device=cpu")
            self.device = torch.device(name, int(os.environ.get("LOCAL_RANK", 0)))
        self.precision: Literal["32-true", "64-true", "bf16-mixed"]
        if precision == "auto":
            self.precision = "bf16-mixed" if fast_bf16(self.device) else "32-true"
        else:
            self.precision = precision
        self.threads, self.observe_every = threads, observe_every
        self.progress = sys.stderr.isatty() if progress == "auto" else progress == "always"
        self.tf32 = tf32 and name == "cuda"
        if tf32 and not self.tf32:
            log.warning("trainer.tf32: there is no GPU here; float32 stays what it is")
        self.compile, self.recompute = compile, recompute

    def apply(self) -> None:
        """Set what torch keeps for the whole process: threads, and how GPUs multiply float32."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32


@dataclass(kw_only=True)
class Runtime:
    """Everything a stage needs to compute, and nothing it may not see.

    Attributes:
        workdir: holds the checkpoint of the stage while it runs.
        recorder: takes curves and pictures; it gives nothing back.
        stopwatch: keeps the seconds of the whole stage, whatever trainings it consists of.
        tally: keeps the work of its trainings; what else a stage computes is not counted.
    """

    trainer_config: TrainerConfig
    seed: int
    workdir: Path
    recorder: Recorder = field(default_factory=Recorder)
    logger: Logger | None = None
    stopwatch: Stopwatch | None = None
    tally: Tally = field(default_factory=Tally)

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
