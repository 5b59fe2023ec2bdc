"""Reports over synthetic result folders: arithmetic, escaping, nothing left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

from dhbe.report.collect import collect, markdown, summarize
from dhbe.report.folder import detail, percent


def write_cell(folder: Path, *, seed: int, asr: float, defense: str = "dhbe") -> None:
    rates = {"acc": 0.9, "asr": 1.0, "asr_conditional": 1.0, "ra": 0.0}
    metrics = {
        "victim": rates,
        "purified": rates | {"acc": 0.8, "asr": asr},
        "der": 0.9,
        "counts": {},
        "data": "<b>cifar10</b>",
        "model": "m",
        "attack": "badnets",
        "defense": defense,
        "budget": "none",
        "selection": "fixed",
        "seed": seed,
        "poison_rate": 0.1,
        "seconds": {"victim": 1.0, "defense": 2.0, "evaluate": 3.0},
        "commit": None,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for seed, asr in enumerate((0.1, 0.2, 0.3)):
        write_cell(tmp_path / "r" / f"c{seed}", seed=seed, asr=asr)
    write_cell(tmp_path / "r" / "other", seed=0, asr=0.5, defense="clp")
    (tmp_path / "r" / ".unfinished.partial").mkdir()
    return tmp_path / "r"


def test_summary_by_hand(cells: Path) -> None:
    table = collect([cells, cells / "c0"])
    assert len(table) == 4
    summary = summarize(table).set_index("defense")
    assert summary.loc["dhbe", "n"] == 3
    # mean 20, sd 10, t(0.975, 2) = 4.3027: 4.3027 * 10 / sqrt(3) = 24.8
    assert summary.loc["dhbe", "purified ASR"] == "20.0 ± 24.8"
    assert summary.loc["clp", "purified ASR"] == "50.0"
    assert markdown(pd.DataFrame({"a": [1]})) == "| a |\n| --- |\n| 1 |\n"


def test_command_writes_everything_and_escapes(cells: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dhbe.report", str(cells), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "summary.md",
        "summary.png",
        "index.html",
    }
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;b&gt;cifar10" in page
    assert "<b>" not in page


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dhbe.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no metrics.json below" in done.stderr


def test_texts() -> None:
    assert percent(0.1234) == "12.3 %"
    assert percent(None) == "–"
    assert detail({"hits": 1, "total": 2, "wilson95": [0.1, 0.9]}) == "1/2, 95 %: 10.0–90.0"
    assert detail({"hits": 0, "total": 0, "wilson95": None}) == ""
