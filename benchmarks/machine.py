"""What timings share: the machine in a line, a clock that waits for it, medians of turns."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dhbe.core.provenance import commit
from dhbe.training.work import device_name

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about() -> str:
    """Versions, device, threads, commit, and what else kept the machine busy."""
    capability = torch.backends.cpu.get_cpu_capability()
    load = Path("/proc/loadavg")
    busy = load.read_text().split()[0] if load.exists() else "unknown"
    return (
        f"torch {torch.__version__}, {device_name(DEVICE)}, {platform.machine()} {capability}, "
        f"{torch.get_num_threads()} threads, load {busy}, commit {commit()}"
    )


def now() -> float:
    """Seconds, when the device has done what it was told so far."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def medians(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, made in turns so that a noisy machine slows all alike.

    A round before the first is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = now()
            call()
            if turn:
                times[name].append(now() - start)
    return {name: statistics.median(found) for name, found in times.items()}
