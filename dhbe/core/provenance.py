"""Provenance of a result: commit and versions."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from dhbe.core.paths import PACKAGE

PACKAGES = ("torch", "torchvision", "pytorch-lightning", "hydra-core", "timm", "numpy")


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
