"""Work: floating-point operations and bytes of trainings, counted on sampled batches.

A multiply-add is 2 FLOP; matrix products, convolutions and attention count, forward and backward,
by torch's own formulas; what is done once per element does not. Bytes are those of all tensors that
go into and come out of operators, views left out: what memory would carry without caches and fused
kernels, so an upper bound.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dhbe.training.parallel import count

WINDOW = 5
"""Batches whose mean stands for the others of an epoch; FIP does something else in each fifth."""
PEAKS = {"H200": 989.4e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989.4e12} | {
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}
"""bf16 FLOP/s without sparsity by a part of the device's name, the first that fits; NVIDIA's data
sheets, which print twice that for sparse products (H100: nvidia.com/en-us/data-center/h100, H200,
A100, L40S and L4 likewise)."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """FLOP, bytes and seconds of a computation."""

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0

    def plus(self, other: Work, times: float = 1.0) -> Work:
        """The sum of this and so many times the other."""
        a, b = astuple(self), astuple(other)
        flops, traffic, seconds = (x + times * y for x, y in zip(a, b, strict=True))
        return Work(flops=flops, bytes=traffic, seconds=seconds)


class Counting(TorchDispatchMode):
    """Counts what runs inside the block, backward passes included; changes nothing.

    torch's ``FlopCounterMode`` with bytes, and without the hooks by which it tells modules apart.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = self.bytes = 0

    @property
    def work(self) -> Work:
        """So far, without seconds: counting takes its own."""
        return Work(flops=float(self.flops), bytes=float(self.bytes))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Execute one operator and count it."""
        kwargs = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None and func._can_decompose():  # in inference mode they arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        if not func.is_view:
            self.bytes += _bytes(args) + _bytes(kwargs.values()) + _bytes([out])
        return out


def _bytes(values: Iterable[Any]) -> int:
    """Of all tensors in nested lists."""
    total = 0
    for value in values:
        if isinstance(value, Tensor):
            total += value.nbytes
        elif isinstance(value, (list, tuple)):
            total += _bytes(value)
    return total


class WorkCounter(Callback):
    """Estimates the work of one training from a few batches of epochs 0, 1, 2, 4, 8 ...

    What is done before the first batch of a sampled epoch and the mean of its first five batches
    stand for the epochs until the next sample. Of several processes' equal parts one is counted.
    Travels with the checkpoint; attempts that were killed count up to their last finished epoch.

    Attributes:
        work: so far; the seconds are those of epochs, without what follows their last batch.

    Args:
        processes: that share the training.
    """

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self.work, self._begin, self._batch = Work(), Work(), Work()
        self._mode: Counting | None = None
        self._seen, self._began = 0, 0.0

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count in an epoch that is sampled."""
        self._began, self._seen = time.perf_counter(), 0
        if not trainer.current_epoch & (trainer.current_epoch - 1):
            self._mode = Counting()
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Leave the batch to the sample, or add the estimate."""
        if self._mode is not None and batch_idx == WINDOW:
            self.stop()
        if self._mode is not None:
            self._begin = self._begin if batch_idx else self._mode.work
            self._seen = batch_idx + 1
        else:
            self._add(self._batch if batch_idx else self._begin.plus(self._batch))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add the seconds; an epoch may be shorter than a sample."""
        self.stop()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()  # the kernels of this epoch belong to its seconds
        self.work = self.work.plus(Work(seconds=time.perf_counter() - self._began))

    def stop(self) -> None:
        """End the sample, if there is one."""
        if self._mode is None:
            return
        mode, self._mode = self._mode, None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        self._add(mode.work)
        if self._seen:
            self._batch = Work().plus(mode.work.plus(self._begin, -1), 1 / self._seen)

    def _add(self, work: Work) -> None:
        self.work = self.work.plus(work, self.processes)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {k: asdict(v) for k, v in self._state().items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name in self._state():
            setattr(self, name, Work(**state_dict[name]))

    def _state(self) -> dict[str, Work]:
        return {"work": self.work, "_begin": self._begin, "_batch": self._batch}


class WorkTotal:
    """The work of all trainings of a stage; None before the first that was counted."""

    def __init__(self) -> None:
        self.work: Work | None = None

    def add(self, work: Work) -> None:
        """One more training."""
        self.work = work.plus(self.work or Work())


def device_name(device: torch.device) -> str:
    """Device name as the driver reports it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = (x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def peak(device: torch.device) -> float | None:
    """FLOP/s of bf16 products that the devices of this run have; None where not known."""
    if device.type != "cuda":
        return None
    found = (v for k, v in PEAKS.items() if k in torch.cuda.get_device_name(device))
    one = next(found, None)
    return None if one is None else one * count()
