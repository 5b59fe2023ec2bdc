"""Log a run to the configured tracker: csv, tensorboard or wandb."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from torchvision.utils import make_grid

from dhbe.config import identity
from dhbe.core.errors import ConfigError
from dhbe.experiment.trackers import Untroubled, begin_wandb, wandb_settings
from dhbe.training import parallel as processes


class _Rows(ExperimentWriter):
    """Lightning's, but a resumed run goes on below its earlier rows, instead of deleting them."""

    NAME_METRICS_FILE = "log.csv"

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.exists():
            with file.open(newline="") as rows:
                self.metrics_keys = next(csv.reader(rows), [])

    def save(self) -> None:
        """Write what is new; the folder may have been deleted."""
        if self.metrics:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            super().save()


class RowsLogger(CSVLogger):
    """A row per step in ``log.csv`` of the result folder."""

    @property
    def experiment(self) -> ExperimentWriter:
        """What writes the rows."""
        if not isinstance(self._experiment, _Rows):
            self._experiment = _Rows(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The result folder has its config."""


@contextmanager
def tracked(
    tree: dict[str, Any], choices: Mapping[str, str], folder: Path
) -> Iterator[Untroubled | None]:
    """The config's logger, told the config and closed at the end, so that the next run has its own.

    A cell continues the entry of its name: a killed and resumed one is one entry. At wandb its
    group is the sweep, its tags are the choices in the config groups. What a logger lacks ends the
    run before it computes; what fails later is told, and costs no result.

    Args:
        folder: of the result, while it is made.

    Raises:
        ConfigError: the logger's package is not installed, or has no key.
        DHBEError: it cannot begin.
    """
    node = tree.get("logger")
    if not node or not processes.first():
        yield None
        return
    chosen = choices.get("logger") or node["_target_"].rpartition(".")[2]
    logger = Untroubled(begun(node, tree, choices, folder), chosen)
    status = "failed"
    try:
        logger.log_hyperparams(tree)
        yield logger
        status = "success"
    finally:
        logger.close(status)


def begun(
    node: dict[str, Any], tree: dict[str, Any], choices: Mapping[str, str], folder: Path
) -> Logger:
    """The logger, with its entry begun; see ``tracked``."""
    name = identity.cell_name(tree)
    try:
        kind = get_class(node["_target_"])
        place: dict[str, Any] = {"name": "", "version": name}
        if issubclass(kind, RowsLogger):
            place = {"name": "", "version": "", "save_dir": str(folder)}
        if issubclass(kind, WandbLogger):
            kinds = ("data", "model", "attack", "defense", "budget")
            tags = [f"{k}:{choices[k]}" for k in kinds if choices.get(k)]
            title = f"{choices.get('attack')} {choices.get('defense')} seed {tree['seed']}"
            place = {"name": title, "id": name, "group": choices.get("sweep"), "tags": tags}
            place["settings"] = wandb_settings()
        logger: Logger = instantiate(node, **place)
    except Exception as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        if isinstance(missing, ModuleNotFoundError):
            chosen = choices.get("logger")
            remedy = f'pip install "dhbe[{chosen}]"'
            raise ConfigError(f"logger={chosen}: {missing.msg}; {remedy}") from error
        raise
    if isinstance(logger, WandbLogger):
        begin_wandb(logger, offline=bool(node.get("offline")))
    return logger


def report(
    logger: Untroubled | None, metrics: dict[str, Any], pictures: dict[str, np.ndarray]
) -> None:
    """Final rates as ``<role>/<rate>``, ``der``, seconds, and one grid per picture.

    Args:
        pictures: (N, C, H, W) uint8 each.
    """
    if logger is None:
        return
    final = {f"{r}/{k}": v for r in ("victim", "purified") for k, v in metrics[r].items()}
    final |= {"der": metrics["der"]} | {f"seconds/{k}": v for k, v in metrics["seconds"].items()}
    logger.log_metrics({k: v for k, v in final.items() if v is not None})
    for name, images in pictures.items():
        grid = make_grid(torch.from_numpy(images))  # (3, H, W)
        logger.attempt(partial(_show, logger.inner, f"pictures/{name}", grid))
    logger.save()  # the folder is about to get its final name


def _show(logger: Logger, name: str, grid: torch.Tensor) -> None:
    if isinstance(logger, WandbLogger):
        logger.log_image(name, [grid.permute(1, 2, 0).numpy()])
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment.add_image(name, grid)
