"""Every command of the README works: the Python ones here on tiny settings, the make ones in CI."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from dhbe.config.schema import plain
from dhbe.experiment.assembly import assemble
from dhbe.models.resnet import SmallResNet
from tests.conftest import ROOT
from tests.support.cli import GAME, TINY
from tests.support.commands import called

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
SWEEPS = [line for line in LINES if "+sweep=" in line]
RUNS = [line for line in LINES if line.startswith("python run.py") and line not in SWEEPS]
OTHERS = [line for line in LINES if line not in RUNS + SWEEPS]
REAL = ("data=cifar10", "data=gtsrb", "experiment=")
CHECKED_ELSEWHERE = ("make demo", "make test", 'pip install -e ".[dev]"', "pip install .", "pytest")
"""``.ci/run`` calls them or what they consist of."""


def test_every_command_is_known() -> None:
    assert len(RUNS) >= 8
    for sweep in SWEEPS:
        assert (ROOT / "sweeps" / f"{sweep.split('+sweep=')[1].split()[0]}.yaml").exists()
    for line in OTHERS:
        known = ("python -m dhbe.report", "python -m dhbe.sweeping.status", "export ")
        assert line in CHECKED_ELSEWHERE or line.startswith(known), line
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in ci
    assert "make test" in ci


@pytest.mark.parametrize("line", RUNS)
def test_command_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[2:] if line.startswith("python") else shlex.split(line)[1:]
    if "DHBE_DATA" not in os.environ and any(w.startswith(REAL) for w in words):
        pytest.skip("set DHBE_DATA to run this command on real data")
    network = SmallResNet(
        widths=[16, 24], blocks=1, stem_stride=2, classes=10, channels=3, image_size=32
    )
    torch.save(network.state_dict(), tmp_path / "suspicious.pt")
    extra = ["data.limit=300", "data.train_size=0", *TINY[2:]]
    if "victim=checkpoint" in words:
        extra.remove("victim.epochs=2")
        extra += ["probe.images=12", "probe.steps=2", "probe.width=4"]
    if any(w.startswith(("victim=cpu", "experiment=")) for w in words):
        extra = ["model=resnet_tiny", *extra]
    if any(w.startswith("experiment=") for w in words):
        extra.append("attack.poison_count=3")  # the protocol's number is for the whole set
    chosen = [w for w in words if w.startswith("defense=")] or ["defense=dhbe"]
    if chosen[0].startswith(("defense=dhbe", "defense=dfad")):
        extra += GAME
    if chosen[0] == "defense=anp":
        extra.append("defense.steps=5")
    done = called([str(ROOT / "run.py"), *words, *extra], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("metrics.json"))


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml")))
def test_every_cell_of_every_sweep_assembles(name: str, compose_config) -> None:
    file = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
    parameters = {
        k: re.split(r",\s*(?![^{]*\})", str(v))
        for k, v in file["hydra"]["sweeper"]["params"].items()
    }
    assert math.prod(map(len, parameters.values())) >= 3
    parameters["seed"] = parameters["seed"][:1]  # it decides nothing here
    cells = list(itertools.product(*parameters.values()))
    if len(cells) > 20:  # each value once, among the first of the others
        first = cells[0]
        cells = [
            (*first[:i], value, *first[i + 1 :])
            for i, axis in enumerate(parameters.values())
            for value in axis
        ]
    given = ["victim.path=given.pt"] if name == "finetuned_victims" else []
    for values in cells:
        overrides = [*given, *(f"{k}={v}" for k, v in zip(parameters, values, strict=True))]
        assemble(plain(compose_config(f"+sweep={name}", *overrides)))
