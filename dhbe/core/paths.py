"""Where the package and its configs lie, in a checkout and when installed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent.parent
"""Folder of ``dhbe``."""
ROOT = PACKAGE if (PACKAGE / "conf").is_dir() else PACKAGE.parent
"""Folder that holds configs, zoos and sweeps: the checkout, or the package once installed."""
CONF = ROOT / "conf"
"""Config groups."""
