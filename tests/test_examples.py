"""The scripts in ``examples/``, called as their first lines say; CI executes the notebook."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.support.cli import TINY, metrics
from tests.support.commands import called

EXAMPLES = ROOT / "examples"


def test_a_defense_of_ones_own(tmp_path: Path) -> None:
    words = ["defense=my_defense", "defense.limit=0.5", *TINY, "hydra.run.dir=out"]
    done = called([str(EXAMPLES / "my_defense.py"), *words], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = metrics(tmp_path / "out")
    assert found["defense"] == "my_defense"
    assert "changed no weight" not in " ".join(found["notes"])


def test_its_settings_are_checked(tmp_path: Path) -> None:
    words = ["defense=my_defense", "defense.limit=0"]
    done = called([str(EXAMPLES / "my_defense.py"), *words], cwd=tmp_path)
    assert done.returncode == 2
    assert "defense.limit=0" in done.stderr


@pytest.mark.long
def test_purify_my_model(tmp_path: Path) -> None:
    script = EXAMPLES / "purify_my_model.py"
    network = runpy.run_path(str(script))["MyNetwork"]()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    done = called([str(script), "weights.pt", "--defense", "clp"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    weights = torch.load(tmp_path / "weights-purified.pt", weights_only=True)
    network.load_state_dict(weights, strict=True)
    assert (tmp_path / "purified" / "report.html").exists()


def test_the_notebook_holds_its_outputs() -> None:
    cells = json.loads((EXAMPLES / "compare_defenses.ipynb").read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    assert all(c["execution_count"] for c in code)
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert [o for o in outputs if "image/png" in o.get("data", {})]
