"""Resolvers of the configs."""

from __future__ import annotations

import warnings

from omegaconf import DictConfig, OmegaConf

from dhbe.core.machine import workers
from dhbe.core.paths import PACKAGE


def register_resolvers() -> None:
    """``${cell:}``: hash of what determines the result; ``${package_data:MODULE}``: its folder;
    ``${workers:GIVEN}``: cells that this machine computes at once.
    """
    # Launchers of ours bear the names of the plugins' schemas, which they shall be checked against.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/")
    OmegaConf.register_new_resolver("cell", _cell, replace=True)
    OmegaConf.register_new_resolver("workers", workers, replace=True)
    OmegaConf.register_new_resolver("package_data", _package_data, replace=True)


def _package_data(module: str) -> str:
    """Folder of ``dhbe.<...>``; nothing is imported."""
    return str(PACKAGE.joinpath(*module.split(".")[1:]))


def _cell(*, _root_: DictConfig) -> str:
    from dhbe.config.identity import cell
    from dhbe.config.schema import plain

    return cell(plain(_root_))
