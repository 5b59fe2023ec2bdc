"""``docs/adding_a_method.md``, followed to the letter in a copy of the checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "adding_a_method.md"
COPIED = ("attacks", "conf", "defenses", "dhbe", "run.py", "pyproject.toml", "tests")
TINY = (
    *("data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=2"),
    *("trainer.device=cpu", "trainer.threads=1", "trainer.observe_every=0"),
)


def files() -> dict[str, str]:
    """Path -> text of the page's code blocks, each of which begins with its path."""
    found = {}
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```$", PAGE.read_text(), re.S | re.M):
        path, _, rest = text.partition("\n")
        found[path.removeprefix("# ")] = rest
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout with the page's files, and without anything else that is new."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "corpus", ".*")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
        else:
            shutil.copy(ROOT / name, folder)
    (folder / "sweeps").symlink_to(ROOT / "sweeps")
    for path, text in files().items():
        assert not (folder / path).exists(), "no existing file changes"
        (folder / path).write_text(text)
    return folder


def test_two_files_each() -> None:
    assert list(files()) == [
        "attacks/corner.py",
        "conf/attack/corner.yaml",
        "defenses/head_tuning.py",
        "conf/defense/head_tuning.yaml",
    ]


FOLLOWED = """
import runpy, sys, pytest
assert pytest.main({tests!r}) == 0
sys.argv = {run!r}
runpy.run_path("run.py", run_name="__main__")
"""


@pytest.mark.long
def test_the_contract_tests_pass_and_a_run_has_both(copy: Path) -> None:
    """One interpreter for both: most of its time goes into imports."""
    wanted = ("tests/test_attacks.py", "tests/test_defenses.py")
    chosen = "(corner and not 224) or head_tuning or listed"
    options = ("-q", "-p", "no:cacheprovider", "-n", "0", "--junitxml=seen.xml")
    run = ["run.py", "attack=corner", "defense=head_tuning", *TINY, "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-c", FOLLOWED.format(tests=[*options, *wanted, "-k", chosen], run=run)],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    seen = (copy / "seen.xml").read_text()
    for method in ("corner", "head_tuning"):
        assert re.search(rf'name="test_contract\[[^"]*{method}', seen), "it was found"
    metrics = json.loads((copy / "out" / "metrics.json").read_text())
    assert (metrics["attack"], metrics["defense"]) == ("corner", "head_tuning")
    assert metrics["flops"] == {"victim": None, "defense": None}, "counting is opt-in"
