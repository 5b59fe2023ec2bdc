"""One result folder: written beside its place, renamed when complete, self-explaining."""

from __future__ import annotations

import json
import math
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dhbe.core.errors import ConfigError, DHBEError
from dhbe.core.locks import alone
from dhbe.core.paths import PACKAGE
from dhbe.evaluation.metrics import Predictions, Rate, Truth, der, rates
from dhbe.training.parallel import first

METRICS = "metrics.json"
"""Its presence means that a folder is complete."""
CELL = "cell"
"""In an unfinished folder: whose it is."""
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "timm", "numpy")


class Clock:
    """Wall seconds and peak memory (MB) of each stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure the block; repeated stages add up."""
        _reset_peak(self.device)
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
        self.peaks[name] = max(self.peaks.get(name, 0.0), _peak_mb(self.device))


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:  # Linux: reset the high-water mark; elsewhere a peak is that of the process so far
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    unit = 2**20 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@cache
def commit() -> str | None:
    """Commit of the checkout that this code runs from; None when installed or without git."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=PACKAGE,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


@cache
def versions() -> dict[str, str]:
    """Versions of Python, this project and what the numbers depend on."""
    found = {"python": platform.python_version(), "dhbe": "not installed"}
    with suppress(PackageNotFoundError):  # a checkout that runs as it is
        found["dhbe"] = version("dhbe")
    return found | {p: version(p) for p in PACKAGES}


def summarize(
    victim: Predictions | None, purified: Predictions | None, truth: Truth | None
) -> dict[str, Any]:
    """The ``victim``, ``purified``, ``der`` and ``counts`` entries; None where undefined."""
    names = ("acc", "asr", "asr_conditional", "ra")
    found: dict[str, dict[str, Rate | None]] = {}
    for role, predictions in (("victim", victim), ("purified", purified)):
        found[role] = dict.fromkeys(names)
        if predictions is not None and truth is not None:
            found[role] = rates(predictions, truth)
    values = {
        role: {n: None if r is None else r.value for n, r in rs.items()}
        for role, rs in found.items()
    }
    pairs = [(values["victim"][n], values["purified"][n]) for n in ("acc", "asr")]
    known = all(v is not None for pair in pairs for v in pair)
    counts = {
        role: {n: None if r is None else r.as_dict() for n, r in rs.items()}
        for role, rs in found.items()
    }
    return {**values, "der": der(*pairs) if known else None, "counts": counts}  # type: ignore[arg-type]


class ResultFolder:
    """A folder that appears under its name only when everything is in it.

    Args:
        path: the final place; if it exists it must be empty (Hydra creates it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        self.older = path.with_name(f".{path.name}.older")

    @property
    def complete(self) -> bool:
        """Whether a finished result lies there."""
        return (self.path / METRICS).is_file()

    def metrics(self, cell: str) -> dict[str, Any]:
        """The metrics of the finished result of this cell.

        Raises:
            ConfigError: the folder holds another cell's result.
        """
        found: dict[str, Any] = json.loads((self.path / METRICS).read_text())
        if found.get("cell") != cell:
            raise ConfigError(
                f"hydra.run.dir={self.path}: holds the result of another config; choose another "
                "folder, or set force=true to replace it"
            )
        return found

    def open(self, cell: str) -> Path:
        """Make the working folder; one left by a killed run of the same cell is continued.

        Raises:
            DHBEError: it cannot be written.
        """
        mark = self.partial / CELL
        try:
            if self.partial.exists() and (not mark.exists() or mark.read_text() != cell):
                shutil.rmtree(self.partial)
            self.partial.mkdir(parents=True, exist_ok=True)
            mark.write_text(cell)
        except OSError as error:
            raise DHBEError(f"hydra.run.dir={self.path}: cannot be written ({error})") from error
        return self.partial

    def publish(self) -> None:
        """Rename the working folder to its final name, in place of an older result."""
        if self.complete:
            self.path.rename(self.older)  # a kill from here on loses neither: see ``claimed``
        self.discard_empty()
        try:
            self.partial.rename(self.path)
        except OSError as error:
            raise DHBEError(
                f"hydra.run.dir={self.path}: holds other files; choose another folder "
                f"(the result is in {self.partial})"
            ) from error
        shutil.rmtree(self.older, ignore_errors=True)

    def discard_empty(self) -> None:
        """Remove the folder that Hydra made, if nothing came into it."""
        with suppress(OSError):  # gone, or filled by another process in this very moment
            self.path.rmdir()

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the folder's lock; another run of the same cell waits.

        Raises:
            DHBEError: the place cannot be written.
        """
        if not first():
            yield
            return
        with ExitStack() as stack:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(alone(self.path))
            except OSError as error:
                raise DHBEError(
                    f"hydra.run.dir={self.path}: cannot be written ({error})"
                ) from error
            if self.older.exists():
                self._recover()
            try:
                yield
            finally:
                self._discard_unused()

    def _discard_unused(self) -> None:
        """Remove a working folder that holds its mark alone; only who holds the lock may."""
        with suppress(OSError):
            if [p.name for p in self.partial.iterdir()] == [CELL]:
                shutil.rmtree(self.partial)

    def _recover(self) -> None:
        """Tidy up after a process that was killed while it replaced an older result."""
        if self.complete:
            shutil.rmtree(self.older)
        else:
            self.discard_empty()
            self.older.rename(self.path)


def dump(metrics: dict[str, Any]) -> str:
    """Strict JSON; what is not finite becomes null."""
    return json.dumps(finite(metrics), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The value with None for NaN and infinities."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def save_grid(images: np.ndarray, file: Path, *, columns: int = 8, scale: int = 2) -> None:
    """PNG of images (N, C, H, W) uint8 side by side with a white pixel between them."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * (h + 1), min(n, columns) * (w + 1), 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + 1), i % columns * (w + 1)
        pixels = image.transpose(1, 2, 0) if c != 2 else image[[0, 1, 1]].transpose(1, 2, 0)
        grid[top : top + h, left : left + w] = np.repeat(pixels, 3, 2) if c == 1 else pixels
    big = Image.fromarray(grid)
    big.resize((big.width * scale, big.height * scale), Image.Resampling.NEAREST).save(file)
