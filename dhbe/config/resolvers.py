"""Resolvers of the configs."""

from __future__ import annotations

import os
import textwrap
import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dhbe.config.identity import cell_name, content
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.core.errors import DHBEError
from dhbe.core.folders import matching
from dhbe.core.machine import cells_at_once
from dhbe.core.paths import CONF, PACKAGE

HELP_WIDTH, HELP_INDENT = 110, 18
"""Of the lists of choices in ``dhbe --help``, in characters."""


def register_resolvers() -> None:
    """Register the resolvers with OmegaConf.

    ``${cell:}``: hash of what determines the result;
    ``${choices:GROUP}``: names of the configs of a group, for ``--help``;
    ``${content:KEY,FOLDER/PATTERN}``: fingerprint of the files that keys beside it name;
    ``${package_data:MODULE}``: its folder;
    ``${workers:GIVEN}``: cells that this machine computes at once.
    """
    # Launchers of ours bear the names of the plugins' schemas, which they shall be checked against.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/")
    OmegaConf.register_new_resolver("cell", _cell, replace=True)
    OmegaConf.register_new_resolver("choices", choices, replace=True)
    OmegaConf.register_new_resolver("content", _content, replace=True)
    OmegaConf.register_new_resolver("workers", cells_at_once, replace=True)
    OmegaConf.register_new_resolver("package_data", _package_data, replace=True)


def choices(group: str) -> str:
    """Names of a group's configs, wrapped for a column of ``dhbe --help``."""
    names = ", ".join(sorted(p.stem for p in (CONF / group).glob("*.yaml")))
    return textwrap.fill(names, HELP_WIDTH - HELP_INDENT).replace("\n", "\n" + " " * HELP_INDENT)


def _package_data(module: str) -> str:
    """Folder of ``dhbe.<...>``; nothing is imported."""
    return str(PACKAGE.joinpath(*module.split(".")[1:]))


def name_of(cfg: DictConfig) -> str:
    """Name of the result of a composed config: the hash of what it is when resolved completely.

    A config that cannot be resolved gets the name of what is known; its run says what is wrong.
    """
    tree = plain(cfg)
    try:
        return cell_name(resolved(tree, {})[0])
    except (DHBEError, OSError):
        return cell_name(tree)


def _cell(*, _root_: DictConfig) -> str:
    return name_of(_root_)


def _content(*keys: str, _parent_: DictConfig) -> str:
    """Fingerprint of the files at the paths that these keys beside it hold.

    ``KEY`` holds a path, or ``FILE:NAME``; ``FOLDER/PATTERN`` two keys, of a folder and of a path
    or pattern inside it.
    """
    paths: list[Path] = []
    for key in keys:
        values: list[Any] = [
            None if OmegaConf.is_missing(_parent_, k) else _parent_.get(k) for k in key.split("/")
        ]
        if None in values:
            continue
        place = Path(str(values[0])).expanduser()
        if len(values) > 1:
            paths += matching(place, str(values[1]))
        else:
            paths.append(
                place if os.path.exists(place) else Path(str(values[0]).rpartition(":")[0])
            )
    return content(p for p in paths if p != Path())
