"""Every command of the README works: the Python ones here on tiny settings, the make ones in CI."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_spec
from test_cli import GAME, TINY

from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINES = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]
RUNS = [line for line in LINES if line.startswith(("python run.py", "dhbe "))]
OTHERS = [line for line in LINES if line not in RUNS]
CHECKED_ELSEWHERE = ("make demo", "make test", 'pip install -e ".[dev]"', "pip install .", "pytest")
"""``.ci/run`` calls them or what they consist of."""


def test_every_command_is_known() -> None:
    assert len(RUNS) >= 8
    for line in OTHERS:
        assert line in CHECKED_ELSEWHERE or line.startswith(("python -m dhbe.report", "export ")), (
            line
        )
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make demo" in ci
    assert "make test" in ci


@pytest.mark.parametrize("line", RUNS)
def test_command_runs(line: str, tmp_path: Path) -> None:
    words = shlex.split(line)[2:] if line.startswith("python") else shlex.split(line)[1:]
    real = any(w.startswith(("data=cifar10", "data=gtsrb", "experiment=")) for w in words)
    if real and "DHBE_DATA" not in os.environ:
        pytest.skip("set DHBE_DATA to run this command on real data")
    network = SmallResNet(
        widths=[8, 16], blocks=1, stem_stride=2, classes=10, channels=3, image_size=32
    )
    suspicious = Normalized(network, make_spec(image_size=32, classes=10))
    torch.save(suspicious.network.state_dict(), tmp_path / "suspicious.pt")
    shrunk = [*TINY[:1], "data.train_size=0", *TINY[2:]]
    if "checkpoint" in line:
        shrunk.remove("victim.epochs=2")
    game = not any(w.startswith("defense=") and "dhbe" not in w for w in words)
    swept = ("defense=" in line and "," in line) or "sweep" in line
    if swept:
        shrunk += ["+hydra.sweeper.params.defense=clp,none", "hydra.sweeper.params.seed=0"]
    extra = [*shrunk, *(GAME if game and not swept else ())]
    if any(w.startswith("model=") for w in words) or "victim=cpu" in line or "experiment" in line:
        extra = [e for e in extra if not e.startswith("model.widths")] + ["model=resnet_tiny"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *words, *extra],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("metrics.json"))
