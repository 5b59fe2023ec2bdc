"""The command line as a user meets it: real runs on tiny settings, and all that goes wrong."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.support.cli import GAME, TINY, metrics, run
from tests.support.commands import called


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which one tiny run is finished, in ``one``."""
    folder = tmp_path_factory.mktemp("runs")
    done = run(folder, *TINY, *GAME, "trainer.count=true", "hydra.run.dir=one")
    assert done.returncode == 0, done.stderr
    assert "result: " in done.stdout
    return folder


def test_the_result_folder_is_whole(finished: Path) -> None:
    one = finished / "one"
    m = metrics(one)
    assert set(m) >= {
        *("victim", "purified", "der", "counts", "data", "model", "attack", "defense", "budget"),
        *("selection", "seed", "seconds", "cached_victim", "peak_memory_mb", "versions", "commit"),
    }
    for role in ("victim", "purified"):
        assert set(m[role]) == {"acc", "asr", "asr_conditional", "ra"}
        assert m["counts"][role]["acc"]["total"] == 300
        assert m["counts"][role]["asr"]["total"] == 270
    assert m["poisoned"] == pytest.approx(m["poison_rate"], abs=0.002)
    assert (m["attack"], m["defense"], m["budget"]) == ("badnets", "dhbe", "none")
    assert set(m["seconds"]) == {"victim", "defense", "evaluate"}
    assert m["cached_victim"] is False
    for stage, seconds in m["trained_seconds"].items():
        assert 0 < seconds < m["seconds"][stage]
        assert m["flops"][stage] > m["bytes"][stage] > 0
    stored = np.load(one / "predictions.npz")
    hits = (stored["purified_clean"] == stored["labels"]).sum()
    assert hits / 300 == m["purified"]["acc"]
    weights = load_file(one / "purified.safetensors")
    assert all(w.isfinite().all() for w in weights.values() if w.is_floating_point())
    assert (one / "config.yaml").exists()
    assert sorted(p.name for p in (one / "pictures").iterdir()) == [
        "generated_0001.png",
        "generated_0002.png",
        "patches_0001.png",
        "patches_0002.png",
    ]
    assert not list(finished.glob(".*.partial"))
    assert not (one / "training").exists()


def test_the_page_stands_alone(finished: Path) -> None:
    page = (finished / "one" / "report.html").read_text()
    assert "attack success rate" in page
    assert page.count("data:image/png;base64") > 20
    assert 'src="http' not in page
    assert "<script" not in page


def test_the_victim_is_shared_and_the_same_run_is_reused(finished: Path) -> None:
    other = run(finished, *TINY, "defense=clp", "hydra.run.dir=two")
    assert other.returncode == 0, other.stderr
    assert metrics(finished / "two")["cached_victim"] is True
    assert metrics(finished / "two")["victim"] == metrics(finished / "one")["victim"]
    before = (finished / "one" / "metrics.json").stat().st_mtime_ns
    again = run(finished, *TINY, *GAME, "hydra.run.dir=one")
    assert again.returncode == 0
    assert "already there" in again.stdout
    assert (finished / "one" / "metrics.json").stat().st_mtime_ns == before


def test_same_config_same_numbers(finished: Path) -> None:
    again = run(finished, *TINY, *GAME, "hydra.run.dir=same", victims="fresh")
    assert again.returncode == 0, again.stderr
    for key in ("victim", "purified", "counts"):
        assert metrics(finished / "same")[key] == metrics(finished / "one")[key]


def test_another_config_does_not_overwrite(finished: Path) -> None:
    done = run(finished, *TINY, "defense=none", "hydra.run.dir=one")
    assert done.returncode == 2
    assert "holds the result of another config" in done.stderr
    assert metrics(finished / "one")["defense"] == "dhbe"


@pytest.mark.long
def test_a_sweep_shares_victims_and_names_cells(finished: Path) -> None:
    done = run(finished, "-m", *TINY, "defense=none,clp", "seed=0")
    assert done.returncode == 0, done.stderr
    cells = [p for p in (finished / "results").iterdir() if (p / "metrics.json").exists()]
    assert {metrics(c)["defense"] for c in cells} == {"none", "clp"}
    assert all(metrics(c)["cached_victim"] for c in cells)
    none = next(m for m in map(metrics, cells) if m["defense"] == "none")
    assert none["purified"] == none["victim"]


@pytest.mark.long
def test_own_checkpoint_without_and_with_data(finished: Path) -> None:
    file = finished / "one" / "purified.safetensors"
    probe = ("probe.images=12", "probe.steps=2", "probe.width=4")
    base = ("victim=checkpoint", f"victim.path={file}", "attack=none", *probe)
    base = (*base, "model.widths=[16,24]")
    with_data = run(finished, *base, "data.limit=300", "defense=clp", "hydra.run.dir=own")
    assert with_data.returncode == 0, with_data.stderr
    m = metrics(finished / "own")
    assert m["victim"]["acc"] == metrics(finished / "one")["purified"]["acc"]
    assert m["victim"]["asr"] is None
    without = run(finished, *base, "data=unknown", *GAME, "hydra.run.dir=blind")
    assert without.returncode == 0, without.stderr
    assert metrics(finished / "blind")["purified"]["acc"] is None
    assert (finished / "blind" / "purified.safetensors").exists()


@pytest.mark.long
def test_clean_training_measures_accuracy_alone(finished: Path) -> None:
    done = run(finished, *TINY, "attack=none", "defense=none", "hydra.run.dir=clean")
    assert done.returncode == 0, done.stderr
    m = metrics(finished / "clean")
    assert m["victim"]["acc"] > 0.1
    assert m["victim"]["asr"] is None


@pytest.mark.parametrize(
    ("overrides", "status", "message"),
    [
        (["attack=badnet"], 2, "Could not find 'attack/badnet'"),
        (["attack.poison=0.1"], 2, "attack.poison"),
        (["attack.poison_rate=abc"], 2, "attack.poison_rate=abc"),
        (["defense=finetune", "budget=none"], 2, "budget=none: FineTune needs clean images"),
        (["attack.target_class=12"], 2, "attack.target_class=12: expected a class"),
        (["data=cifar10", "paths.data=/nowhere"], 1, "set DHBE_DATA"),
        (["victim=checkpoint", "victim.path=/nowhere.pt"], 1, "/nowhere.pt: no such file"),
        (
            ["victim=checkpoint", f"victim.path='{ROOT}/LICENSE'"],
            1,
            "LICENSE: not a safetensors file",
        ),
        (["hydra.run.dir=/proc/nowhere"], 1, "/proc/nowhere"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_mistakes_end_with_one_clear_message(
    tmp_path: Path, overrides: list[str], status: int, message: str
) -> None:
    done = run(tmp_path, *overrides)
    assert done.returncode == status, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock"]
    assert not left, "nothing half-written stays behind"


def test_the_traceback_is_there_when_asked_for(tmp_path: Path) -> None:
    done = run(tmp_path, "attack.target_class=12", HYDRA_FULL_ERROR="1")
    assert "Traceback" in done.stderr


def test_a_damaged_victim_is_named(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished / "victims", tmp_path / "victims")
    for weights in (tmp_path / "victims").glob("*/victim.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-8])
    done = run(tmp_path, *TINY, "defense=none")
    assert done.returncode == 1
    assert "truncated or edited" in done.stderr
    assert "to train it anew" in done.stderr


def test_the_embedded_quickstart_defaults() -> None:
    """The default run is the documented one, and it needs no data root."""
    env = {k: v for k, v in os.environ.items() if k != "DHBE_DATA"}
    done = called([str(ROOT / "run.py"), "--cfg", "job"], cwd=ROOT, env=env)
    for line in ("name: cifar10_mini", "attacks.badnets.BadNets", "defenses.dhbe.DHBE"):
        assert line in done.stdout


@pytest.mark.long
def test_a_detector_says_what_it_suspects_and_the_page_what_is_true(finished: Path) -> None:
    options = ("defense=ulrl", "defense.outlier=0.1", "budget=pct5", "defense.most=2")
    done = run(finished, *TINY, *options, "hydra.run.dir=detector")
    assert done.returncode == 0, done.stderr
    m, page = metrics(finished / "detector"), (finished / "detector" / "report.html").read_text()
    assert m["suspected"]["targets"] == [0]
    assert len(m["suspected"]["classes"]) == 2, "a tenth of a deviation is nothing"
    assert set(m["suspected"]["classes"]) <= set(range(10))
    listed = ", ".join(map(str, m["suspected"]["classes"]))
    assert f"suspicious classes: {listed}" in page
    assert "the attacker's target class is 0" in page
    assert "suspected" not in metrics(finished / "one"), "DHBE detects nothing"
