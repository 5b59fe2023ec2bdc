"""The wheel: one package, which works from any folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import dhbe
from tests.conftest import ROOT

COPIED = ("attacks", "conf", "defenses", "dhbe", "sweeps")
FILES = ("LICENSE", "README.md", "pyproject.toml", "run.py", "setup.py")


def python(*arguments: str, folder: Path, path: Path) -> str:
    """Output of an interpreter that finds the project in ``path``, not in the checkout."""
    env = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder into which a wheel built from a copy of the checkout was unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    python("-c", build, folder=source, path=folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_only_dhbe_is_installed(installed: Path) -> None:
    places = {p.name for p in installed.iterdir()}
    assert places == {"dhbe", f"dhbe-{dhbe.__version__}.dist-info"}
    assert (installed / "dhbe" / "py.typed").exists()
    sweeps = [p for p in installed.rglob("poison_rate.yaml")]
    assert sweeps == [installed / "dhbe" / "conf" / "sweep" / "poison_rate.yaml"]


CALLED = """
import ast, sys
from dhbe.cli import main, purify
from dhbe.report.__main__ import main as report
for name, words in ast.literal_eval(sys.argv[1]):
    sys.argv = [name, *words]
    try:
        globals()[name]()
    except SystemExit as end:
        assert not end.code, name
"""
"""One interpreter for all: most of its time goes into imports."""


@pytest.mark.long
def test_commands_work_from_another_folder(installed: Path, tmp_path: Path) -> None:
    tiny = ["data.limit=200", "data.train_size=7600", "victim.epochs=1", "defense=clp"]
    file = "out/cell/purified.safetensors"
    given = ["defense=clp", "probe.images=4", "probe.steps=1", "trainer.threads=1"]
    calls = [
        ("main", ["--version"]),
        ("main", [*tiny, "trainer.threads=1", "hydra.run.dir=out/cell"]),
        ("purify", [file, *given, "hydra.run.dir=pure"]),
        ("report", ["out", "--out", "page"]),
    ]
    assert dhbe.__version__ in python("-c", CALLED, repr(calls), folder=tmp_path, path=installed)
    for made in ("out/cell/report.html", "pure/purified.safetensors", "page/index.html"):
        assert (tmp_path / made).exists()
