"""Who may import whom, how large things are, and that importing does no work."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import house

FILES = [file for _, file in house.sources()]
DEFENSES_MAY_NOT_KNOW = ("dhbe.contracts.attack", "dhbe.victim", "dhbe.evaluation")
MOST_LINES = {"dhbe": 350, "attacks": 150, "defenses": 150}
MOST_PAIRS = 100
LOOSE = {"__init__.py", "api.py", "cli.py"}


def level(room: str) -> int:
    return next(i for i, rooms in enumerate(house.floors()) if room in rooms)


def test_every_room_is_on_a_floor() -> None:
    drawn = {room for rooms in house.floors() for room in rooms} | set(house.OUTSIDE)
    assert {room for room, _ in house.sources()} - {"__init__"} == drawn


def test_imports_go_one_way() -> None:
    pairs = house.arrows()
    upward = {
        f"{a} imports {b}: {', '.join(str(f.relative_to(ROOT)) for f in files)}"
        for (a, b), files in pairs.items()
        if a not in house.OUTSIDE and b not in house.OUTSIDE and level(a) < level(b)
    }
    assert not upward
    assert not [(a, b) for a, b in pairs if (b, a) in pairs]
    assert not [a for a, b in pairs if {a, b} == set(house.ZOOS)]
    assert len(pairs) <= MOST_PAIRS


def test_the_report_needs_names_alone() -> None:
    assert {b for a, b in house.arrows() if a == "report"} <= {"config", "core"}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_of_each_file(file: Path) -> None:
    """Absolute imports, no name of a zoo inside the package, a size one can read."""
    top = file.relative_to(ROOT).parts[0]
    text = file.read_text()
    assert len(text.splitlines()) <= MOST_LINES[top]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = node.body[0]
            first = doc.end_lineno if ast.get_docstring(node) else node.lineno
            assert first is not None
            assert node.end_lineno is not None
            assert node.end_lineno - first < 50, node.name
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and top == "dhbe":
            assert not node.value.startswith(("attacks.", "defenses.")), node.value
    names = set(house.imported(file))
    if top == "dhbe":
        assert not [n for n in names if n.split(".")[0] in (*house.ZOOS, "sweeps", "run")]
    if top == "defenses" or file == ROOT / "dhbe" / "contracts" / "defense.py":
        assert not [n for n in names if n.startswith(DEFENSES_MAY_NOT_KNOW)]


def test_no_module_stands_loose() -> None:
    assert {f.name for f in (ROOT / "dhbe").glob("*.py")} == LOOSE


@pytest.mark.long
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
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_report_needs_no_torch() -> None:
    code = "import sys, dhbe.report.page, dhbe.report.console; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
