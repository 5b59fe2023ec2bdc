"""Who may import whom, and that importing does no work."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted(
    f for d in ("dhbe", "attacks", "defenses", "sweeps") for f in (ROOT / d).rglob("*.py")
)
FORBIDDEN = {
    "dhbe": ("attacks", "defenses", "run", "sweeps"),
    "attacks": (
        "defenses",
        "run",
        "dhbe.experiment",
        "dhbe.evaluation",
        "dhbe.contracts.defense",
    ),
    "defenses": (
        "attacks",
        "run",
        "dhbe.contracts.attack",
        "dhbe.victim",
        "dhbe.evaluation",
        "dhbe.experiment",
    ),
    "dhbe/game": (
        "dhbe.data",
        "dhbe.contracts",
        "dhbe.victim",
        "dhbe.evaluation",
        "dhbe.experiment",
    ),
    "dhbe/report": (
        "torch",
        "dhbe.experiment",
        "dhbe.evaluation",
        "dhbe.contracts",
        "dhbe.data",
    ),
    "dhbe/contracts/defense.py": ("dhbe.contracts.attack", "dhbe.victim", "dhbe.evaluation"),
}


def imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


@pytest.mark.parametrize("place", FORBIDDEN)
def test_imports_go_one_way(place: str) -> None:
    inside = [f for f in FILES if f.relative_to(ROOT).as_posix().startswith(place)]
    assert inside
    for file in inside:
        for name in imported(file):
            for forbidden in FORBIDDEN[place]:
                assert not (name + ".").startswith(forbidden + "."), f"{file} imports {name}"


def test_import_does_no_work(tmp_path: Path) -> None:
    """Importing every module writes nothing, seeds nothing, and starts no threads of ours."""
    modules = [
        ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for f in FILES
        if f.name != "__main__.py"
    ]
    code = (
        "import threading, torch, importlib; state = torch.get_rng_state(); "
        f"[importlib.import_module(m) for m in {modules!r}]; "
        "assert torch.equal(state, torch.get_rng_state()); assert threading.active_count() == 1"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_report_needs_no_torch() -> None:
    code = "import sys, dhbe.report.page, dhbe.report.console; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
