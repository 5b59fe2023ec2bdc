"""What every test file may ask for; the fixtures are in ``tests/support/fixtures.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

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


def tiered(values: Iterable[Any], quick: Callable[[Any], object]) -> list[Any]:
    """Parameters of a test, of which those that are not ``quick`` are for ``make test-long``."""
    return [pytest.param(v, marks=() if quick(v) else pytest.mark.long) for v in values]


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """The same, of which each ``every``-th is quick, from the first on; tuples are unpacked."""
    return [
        pytest.param(
            *(v if isinstance(v, tuple) else (v,)), marks=() if i % every == 0 else pytest.mark.long
        )
        for i, v in enumerate(values)
    ]


def each_class(group: str) -> list[Any]:
    """All configs of a group, of which only those that name a class are quick: one of each."""
    return tiered(names(group), lambda n: "\n_target_:" in (CONF / group / f"{n}.yaml").read_text())
