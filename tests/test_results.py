"""Result folders: claimed, replaced without loss, and honest about their seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from dhbe.config.identity import cell_name
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.core.errors import DHBEError
from dhbe.core.types import DataSpec
from dhbe.data import Resident, TrainingBatches
from dhbe.evaluation.evaluator import Evaluator
from dhbe.experiment.folder import ResultFolder
from dhbe.experiment.pipeline import run
from dhbe.training.recorder import Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Cosine, SGDSchedule
from dhbe.training.supervised import Supervised
from tests.support.cli import TINY
from tests.support.fixtures import small


def result(path: Path, text: str) -> ResultFolder:
    """A finished result in the working folder."""
    found = ResultFolder(path)
    (found.open("cell") / "metrics.json").write_text(text)
    return found


def test_only_who_holds_the_lock_removes_an_unused_working_folder(tmp_path: Path) -> None:
    """A run that was refused must not take away what another one has just begun."""
    mine, others = ResultFolder(tmp_path / "abc"), ResultFolder(tmp_path / "abc")
    with mine.claimed():
        work = mine.open("cell")
        others.discard_empty()
        assert work.is_dir()
    assert not work.exists()


def test_a_refusal_inside_the_run_is_not_about_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ResultFolder(tmp_path / "abc")
    with pytest.raises(PermissionError, match="somebody's checkpoint"), folder.claimed():
        raise PermissionError("somebody's checkpoint")
    with folder.claimed():
        pass  # the lock was freed

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(DHBEError, match="abc: cannot be written"), folder.claimed():
        pass


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_kill_while_a_result_is_replaced_loses_none(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result(tmp_path / "abc", "old").publish()
    new = result(tmp_path / "abc", "new")
    rename = Path.rename

    def kill(path: Path, target: Path) -> Any:
        if path == new.partial:
            if moment == "after":
                rename(path, target)
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(KeyboardInterrupt):
            new.publish()
    again = ResultFolder(tmp_path / "abc")
    with again.claimed():
        assert again.complete
        kept = (again.path / "metrics.json").read_text()
        assert kept == {"before": "old", "after": "new"}[moment]
        if moment == "before":
            again.publish()
            assert (again.path / "metrics.json").read_text() == "new"
    assert not again.older.exists()


def test_seconds_of_killed_attempts_count(
    compose_config: Callable[..., DictConfig], tmp_path: Path
) -> None:
    """Checkpoints of a killed run lie there, with the seconds that it took."""
    cfg = compose_config(*TINY, "defense=finetune", "defense.schedule.epochs=1", "budget=pct5")
    folder = tmp_path / "results" / "abc"
    tree, _ = resolved(plain(cfg), {"model": "m"})
    work = ResultFolder(folder).open(cell_name(tree)) / "training"
    work.mkdir()
    (work / "seconds").write_text("2000.0")
    assert 2000 < run(cfg, folder, {"model": "m"})["seconds"]["defense"] < 3000


def test_the_stopwatch_goes_on_over_all_trainings_of_a_stage(
    images: Resident, spec: DataSpec, make_runtime: Callable[..., Runtime], tmp_path: Path
) -> None:
    def fit(runtime: Runtime) -> None:
        schedule = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}
        schedule |= {"shape": Cosine(end=0.0)}
        device = torch.device("cpu")
        batches = TrainingBatches(images, spec=spec, batch_size=40, seed=0, device=device)
        budget = SGDSchedule(epochs=1, batch_size=40, **schedule)
        module = Supervised(small(), batches, budget, role="x")
        runtime.fit(module, batches, epochs=1)

    folder = tmp_path / "work"
    assert Stopwatch(folder).earlier == 0
    runtime = make_runtime()
    runtime.stopwatch = Stopwatch(folder)
    runtime.stopwatch.earlier = 100.0
    fit(runtime.stage("teacher"))
    after_teacher = Stopwatch(folder).earlier
    assert 100 < after_teacher < 200
    fit(runtime)
    assert after_teacher < Stopwatch(folder).earlier < 200


@pytest.mark.long
def test_a_victim_is_judged_once_for_the_defenses_that_share_it(
    compose_config: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[float] = []
    predict = Evaluator.predict

    def watched(self: Evaluator, network: torch.nn.Module, **limit: int) -> Any:
        if not limit:  # the store's own look at the victim has one
            judged.append(float(next(network.parameters()).detach().sum()))
        return predict(self, network, **limit)

    monkeypatch.setattr(Evaluator, "predict", watched)
    found = []
    for seed, defense in ((0, "none"), (0, "clp"), (1, "clp"), (0, "clp")):
        options = ("victim.epochs=1", "trainer.observe_every=0", f"defense={defense}")
        cfg = compose_config(*TINY, *options, f"seed={seed}")
        found.append(run(cfg, tmp_path / f"{len(found)}", {"model": "m"}))
    assert len(judged) == 1 + 1 + 2 + 2, "another victim in between: it is judged anew"
    assert found[0]["victim"] == found[1]["victim"] == found[3]["victim"]
    assert found[1]["purified"] == found[3]["purified"]


def test_a_folder_with_other_files_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    """As what is left of a half-deleted result; with ``force=true`` as well."""
    folder = ResultFolder(tmp_path / "out")
    folder.path.mkdir()
    (folder.path / "notes.txt").touch()
    with (
        pytest.raises(DHBEError, match=r"out: holds files, but no complete result"),
        folder.claimed(),
    ):
        pytest.fail("nothing may be computed")
    (folder.path / "notes.txt").unlink()
    with folder.claimed():
        pass
