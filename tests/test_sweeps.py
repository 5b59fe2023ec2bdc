"""Tables of a sweep from synthetic result folders."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from dhbe.sweeping.attack_table import merged, rows, stealth, text, victims
from tests.conftest import CONF, ROOT, names
from tests.support.commands import called
from tests.support.report import write_cell


def write_attack(folder: Path, attack: str, acc: float, floor: float | None = None) -> None:
    write_cell(folder, seed=0, asr=1.0, defense="none")
    metrics = json.loads((folder / "metrics.json").read_text()) | {"attack": attack}
    metrics["victim"]["acc"] = acc
    if floor is not None:
        metrics["clean_baseline"] = {"asr": floor}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "config.yaml").write_text("victim: {epochs: 10}")
    clean = np.full((4, 3, 16, 16), 100, dtype=np.uint8)
    arrays = {"clean": clean, "index": np.arange(4)}
    if attack != "none":
        arrays["triggered"] = clean + 51
    np.savez(folder / "examples.npz", **arrays)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_attack(tmp_path / "r" / "a", "none", 0.85)
    write_attack(tmp_path / "r" / "b", "blend", 0.84, floor=0.05)
    write_cell(tmp_path / "r" / "c", seed=0, asr=0.1, defense="clp")
    return tmp_path / "r"


def test_table_by_hand(results: Path) -> None:
    table = rows(victims([results])).set_index("attack")
    assert list(table.index) == ["none", "blend"] or list(table.index) == ["blend", "none"]
    row = table.loc["blend"]
    assert (row["acc"], row["floor"], round(row["linf"])) == (84.0, 5.0, 51)
    assert abs(row["psnr"] - 20 * np.log10(5)) < 1e-6  # 51 of 255 is a fifth
    assert row["augmentation"] == "crop_flip", "older results do not say"
    written = text(table.reset_index())
    assert "| 84.0 | -1.0 |" in written
    assert "| 85.0 | +0.0 |" in written


def test_rows_of_other_machines_stay(results: Path, tmp_path: Path) -> None:
    new = rows(victims([results]))
    old = new.assign(acc=1.0, attack=["none", "wanet"], case=[new["case"][0], "another"])
    old.drop(columns="augmentation").to_csv(tmp_path / "old.csv", index=False)
    both = merged(tmp_path / "old.csv", new).set_index("attack")["acc"]
    assert both.to_dict() == {"none": 85.0, "blend": 84.0, "wanet": 1.0}


def test_identical_images_are_perfectly_stealthy() -> None:
    image = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), dtype=np.uint8)
    found = stealth(image, image)
    assert (found["ssim"], found["linf"]) == (1.0, 0.0)


def test_command_writes_table_and_sheet(results: Path, tmp_path: Path) -> None:
    command = ["-m", "dhbe.sweeping.attack_table", str(results)]
    command += ["--out", str(tmp_path / "t"), "--sheet", str(tmp_path / "t.png")]
    assert called(command, cwd=ROOT).returncode == 0
    page = tmp_path / "t.md"
    page.write_text("How it was made.\n\n<!-- table -->\n\nold")
    assert called(command, cwd=ROOT).returncode == 0
    assert page.read_text().startswith("How it was made.\n\n<!-- table -->\n\n| data |")
    assert len(pd.read_csv(tmp_path / "t.csv")) == 2
    assert (tmp_path / "t.md").read_text().count("blend") == 1
    assert (tmp_path / "t.png").stat().st_size > 1000
    empty = [*command[:2], str(tmp_path / "nothing"), "--out", str(tmp_path / "u")]
    failed = called(empty, cwd=ROOT)
    assert failed.returncode == 1
    assert "no finished result" in failed.stderr


def test_the_attack_sweep_covers_the_zoo() -> None:
    """Each attack at CPU scale."""
    swept: set[str] = set()
    for name in ("attacks_cpu", "attacks_cpu_cotrained"):
        node = yaml.safe_load((ROOT / "sweeps" / f"{name}.yaml").read_text())
        swept |= set(node["hydra"]["sweeper"]["params"]["attack"].split(","))
    every = set(names("attack")) - {"picture"}  # whatever the user has
    every -= {"badnets_tri1", "badnets_square"}  # other patterns of badnets, for the full scale
    described = (ROOT / "docs" / "attacks.md").read_text()
    assert swept == {name for name in every if f"`{name}`" in described}, "all but one's own"
    for sweep in (CONF / "sweep").glob("*.yaml"):
        assert sweep.read_text().startswith("# @package _global_\n# Claim: ")
