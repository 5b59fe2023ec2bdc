"""The ``trainer`` config group: device, precision, threads."""

from __future__ import annotations

import logging
import os
import sys
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from dhbe.core.errors import got
from dhbe.training.compile import Compile

log = logging.getLogger(__name__)
Precision = Literal["auto", "32-true", "64-true", "bf16-mixed"]


def fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16; emulated on a CPU it is many times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, c, lambda: False)() for c in checks)


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
        count: count floating-point operations and bytes of sampled batches of every training; a
            short one takes up to a fifth longer.
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
        count: bool = False,
    ) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise got("trainer.device", device, "cpu or auto", "torch sees no CUDA device here")
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
            log.warning("trainer.tf32: there is no GPU here; float32 stays exact")
        self.compile, self.count = compile, count

    def apply(self) -> None:
        """Set torch's process-wide options: threads and float32 matrix precision."""
        if self.threads:
            torch.set_num_threads(self.threads)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = self.tf32
