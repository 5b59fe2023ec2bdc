"""One run on several processes: the same global batch, gradients averaged, BatchNorm over all rows.

Every process carries out the whole run. What is not training is deterministic, so all do it alike
and no stage needs to know; in a training each takes its part of every batch. Only the first writes.
Trainings know the others through ``runtime.processes``; with one process all of it is the identity.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dhbe.core.errors import ConfigError, DHBEError, got

T = TypeVar("T")
WAIT = timedelta(days=7)
"""The first process may wait for another run's lock while the others wait for it."""


def count() -> int:
    """Number of processes of this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def first() -> bool:
    """Whether this process is the one that writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def started() -> bool:
    """Whether this process is one of several, begun by torchrun or ``launch``."""
    return "RANK" in os.environ


def refusal(processes: int) -> ConfigError:
    """Error for settings that do not support several processes."""
    remedy = "sweeps use a process per cell (hydra/launcher=joblib, slurm)"
    return got("trainer.processes", processes, "1 except in a single `python run.py`", remedy)


def refuse_multirun(processes: int) -> None:
    """Refuse several processes per run in a sweep.

    Raises:
        ConfigError: this is a cell of one.
    """
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    if processes > 1 and multirun:
        raise refusal(processes)


def launch(processes: int) -> None:
    """Run this command again in several processes of this machine, as torchrun does.

    Raises:
        ConfigError: not begun from the command line.
        DHBEError: one of them failed; its own message stands above.
    """
    if not HydraConfig.initialized():
        raise refusal(processes)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="dhbe",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except ChildFailedError as error:
        raise DHBEError(f"one of {processes} processes failed; its message is above") from error


@contextmanager
def group(processes: int, device: torch.device) -> Iterator[None]:
    """Join the other processes of this run for as long as the block lasts.

    Raises:
        ConfigError: the number that was started is not ``processes``.
    """
    if processes == 1:
        yield
        return
    if (world := int(os.environ["WORLD_SIZE"])) != processes:
        raise got("trainer.processes", processes, f"{world}, the number that torchrun started")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=WAIT)
    try:
        yield
    finally:
        dist.destroy_process_group()


def agree(value: T) -> T:
    """The first process's value."""
    if count() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        del ctx
        dist.all_reduce(out := x.clone())
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        out: Tensor = _Total.apply(gradients[0])  # so that a second backward sees the sum too
        return out


class Processes:
    """The processes that share the trainings of this run, as each of them sees them."""

    @property
    def count(self) -> int:
        """How many there are."""
        return count()

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return dist.get_rank() if dist.is_initialized() else 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def agree(self, value: T) -> T:
        """The first process's value."""
        return agree(value)

    def rows(self, batch: int) -> slice:
        """Rows of a batch for this process; all of them if they cannot be divided equally.

        In the latter case all processes do the same, which is slower, not wrong.
        """
        if batch % self.count:
            return slice(None)
        part = batch // self.count
        return slice(part * self.rank, part * (self.rank + 1))

    def average(self, tensors: Iterable[Tensor]) -> None:
        """Replace tensors (any shape) by their mean over the processes; a message per dtype."""
        self._together(list(tensors), lambda flat: dist.all_reduce(flat.div_(self.count)))

    def average_gradients(self, optimizers: Iterable[Any]) -> None:
        """Mean over the processes of the gradients that these optimisers are about to follow."""
        groups = [g for o in optimizers for g in o.param_groups]
        self.average(p.grad for g in groups for p in g["params"] if p.grad is not None)

    def align(self, module: nn.Module) -> None:
        """Copy the parameters and buffers of the first process to all others, in place."""
        values = list(module.state_dict().values())
        self._together(values, lambda flat: dist.broadcast(flat, 0))

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Sum of ``x`` (any shape) over the processes; each gets the gradients of all."""
        out: Tensor = _Total.apply(x) if self.count > 1 else x
        return out

    def all_reduce_mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` (any shape) over the processes; gradients flow."""
        return self.all_reduce_sum(x) / self.count if self.count > 1 else x

    def all_reduce_norm(self, norms: Tensor) -> Tensor:
        """Euclidean norms (K,) of all rows from those of each process's rows; gradients flow."""
        return self.all_reduce_sum(norms.square()).sqrt() if self.count > 1 else norms

    @contextmanager
    def synchronised(self, module: nn.Module) -> Iterator[None]:
        """All BatchNorm2d below use the statistics of all processes while the block lasts."""
        layers = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
        changed = layers if self.count > 1 else []

        def forward(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
            return (
                synced_forward(layer, x, self) if layer.training else type(layer).forward(layer, x)
            )

        for layer in changed:
            layer.forward = partial(forward, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in changed:
                del layer.forward

    def _together(self, tensors: Sequence[Tensor], exchange: Callable[[Tensor], object]) -> None:
        if self.count == 1:
            return
        for dtype in dict.fromkeys(t.dtype for t in tensors):  # in the same order everywhere
            alike = [t for t in tensors if t.dtype == dtype]
            flat = _flatten_dense_tensors(alike)
            exchange(flat)
            for tensor, value in zip(alike, _unflatten_dense_tensors(flat, alike), strict=True):
                tensor.copy_(value)


def synced_forward(norm: nn.BatchNorm2d, x: Tensor, processes: Processes) -> Tensor:
    """Forward pass (B, C, H, W) of a BatchNorm in training over the rows of all processes.

    Each process has equally many. torch's own SyncBatchNorm refuses the CPU; this serves both.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    dims, shape = (0, 2, 3), (1, -1, 1, 1)
    centre = processes.all_reduce_mean(wide.mean(dims))
    centred = wide - centre.view(shape)
    variance = processes.all_reduce_mean(centred.square().mean(dims))
    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        n = processes.count * x.numel() / x.shape[1]
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(centre.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_((variance * n / (n - 1)).to(norm.running_var), norm.momentum)
    out = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)
