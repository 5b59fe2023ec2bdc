"""Resolvers of the configs."""

from __future__ import annotations

import warnings
from importlib.resources import files

from omegaconf import DictConfig, OmegaConf


def register_resolvers() -> None:
    """``${cell:}``: hash of what determines the result; ``${package_data:MODULE}``: its folder;
    ``${workers:GIVEN}``: cells that this machine computes at once.
    """
    # Launchers of ours bear the names of the plugins' schemas, which they shall be checked against.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/")
    OmegaConf.register_new_resolver("cell", _cell, replace=True)
    OmegaConf.register_new_resolver("workers", _workers, replace=True)
    OmegaConf.register_new_resolver("package_data", lambda module: str(files(module)), replace=True)


def _cell(*, _root_: DictConfig) -> str:
    from dhbe.config.identity import cell
    from dhbe.config.schema import plain

    return cell(plain(_root_))


def _workers(given: int) -> int:
    from dhbe.sweeping.workers import workers

    return workers(given)
