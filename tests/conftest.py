"""What every test file may ask for; the fixtures are in ``tests/support/fixtures.py``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"
needs_data = pytest.mark.skipif(
    "DHBE_DATA" not in os.environ, reason="set DHBE_DATA to the folder with the real data sets"
)


def pytest_configure(config: pytest.Config) -> None:
    """Load the fixtures where tests run: a process that only hands them out needs no torch."""
    if not config.option.numprocesses:
        config.pluginmanager.import_plugin("tests.support.fixtures")


def names(group: str) -> list[str]:
    """All configs of a group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))
