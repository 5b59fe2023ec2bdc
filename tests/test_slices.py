"""A sweep in slices: interrupted, resumed, failing, and what its exit status says."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra

from dhbe.config.resolvers import register_resolvers
from dhbe.core.errors import DivergenceError
from dhbe.experiment import pipeline
from dhbe.sweeping.slices import planned, work
from dhbe.sweeping.status import Names, state
from tests.conftest import ROOT
from tests.support.commands import Command

CELLS = ("attack=badnets", "seed=0", "defense=none,clp")
TINY = ("data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=30")


def begun(folder: Path, *options: str) -> Command:
    places = (f"paths.results={folder}/results", f"paths.victims={folder}/victims")
    words = ["-m", "dhbe.sweeping.slices", "quick", *CELLS, *TINY, *places, *options]
    return Command(words, cwd=ROOT)


def ended(process: Command) -> tuple[int | None, str]:
    said, complaints = process.communicate(timeout=300)
    return process.returncode, said + complaints


@pytest.mark.long
def test_two_cells_in_two_slices_of_which_one_is_interrupted(tmp_path: Path) -> None:
    """The rehearsal of ``docs/full_scale.md``."""
    first = begun(tmp_path, "--minutes", "9")
    while first.poll() is None and not list(tmp_path.glob("victims/.*.partial/last.ckpt")):
        time.sleep(0.02)
    first.send_signal(signal.SIGTERM)
    code, said = ended(first)
    assert (code, "0 of 2 cells done, 0 failed, 2 remain" in said) == (3, True), said
    (checkpoint,) = tmp_path.glob("victims/.*.partial/last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["epoch"] < 29
    code, said = ended(begun(tmp_path, "--drop-weights"))
    assert (code, "2 of 2 cells done, 0 failed, 0 remain" in said) == (0, True), said
    (victim,) = tmp_path.glob("victims/[!.]*/victim.json")
    assert [r["epoch"] for r in json.loads(victim.read_text())["curves"]] == list(range(30))
    results = list(tmp_path.glob("results/[!.]*"))
    assert len(results) == 2
    assert not list(tmp_path.rglob("purified.safetensors"))
    size = sum(f.stat().st_size for f in (tmp_path / "results").rglob("*") if f.is_file())
    assert size < 2 * 400_000, "small enough to copy"


@pytest.mark.long
def test_a_slice_ends_on_time(tmp_path: Path) -> None:
    code, said = ended(begun(tmp_path, "victim.epochs=100000", "--minutes", "0.04"))
    assert (code, "2 remain" in said) == (3, True), said


@pytest.mark.long
def test_failed_cells_are_left_alone_until_they_are_to_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def run(config, folder: Path, choices) -> dict:
        tried.append(choices["defense"])
        if choices["defense"] == "none":
            raise DivergenceError("too fast")
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"cell": folder.name}))
        return {}

    monkeypatch.setattr(pipeline, "run", run)
    register_resolvers()
    for retry in (False, False, True):
        GlobalHydra.instance().clear()
        plan = planned("quick", [*CELLS, f"paths.results={tmp_path}"], retry=retry)
        names = Names(plan)
        work(plan, names, weights=True)
    assert tried == ["none", "clp", "none"]
    assert [state(tmp_path / n, plan.started) for n in names.found] == ["failed", "done"]
    (failure,) = plan.failures()
    assert failure["message"] == "too fast"


def test_what_is_given_replaces_what_the_sweep_says(tmp_path: Path) -> None:
    register_resolvers()
    GlobalHydra.instance().clear()
    plan = planned("quick", ["seed=7", "defense=clp", f"paths.results={tmp_path}"], retry=False)
    attacks = [next(o for o in c if o.startswith("attack=")) for c in plan.cells]
    assert attacks == ["attack=badnets", "attack=blend", "attack=trojan_sq"]
    assert all("seed=7" in c and "defense=clp" in c and len(c) == 8 for c in plan.cells)
