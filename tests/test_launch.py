"""Sweeps as a user launches them: launchers, failures, claims, status, and the shipped sweeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import RunMode

from dhbe.config.arguments import refuse_ignored
from dhbe.core.errors import ConfigError
from dhbe.report.collect import collect
from dhbe.report.failed import failures
from dhbe.sweeping.callback import Sweep
from dhbe.sweeping.failures import PLANS, SUFFIX, failure_file, record_lost_jobs, write_json
from dhbe.sweeping.plan import Plan, summarize
from dhbe.sweeping.status import Names, left, newest, state, view
from dhbe.sweeping.workers import take_slot
from tests.conftest import CONF, ROOT, names
from tests.support.commands import Command, called
from tests.support.launch import CELL, job

TINY = (
    *("data.limit=200", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=1"),
    *("trainer.threads=1", "defense=clp", "attack=blend"),
)


def started(*overrides: str) -> Command:
    """``python run.py -m`` with these overrides."""
    return Command([str(ROOT / "run.py"), "-m", *overrides], cwd=ROOT)


def run(*overrides: str) -> subprocess.CompletedProcess[str]:
    """The same, seen to its end."""
    return called([str(ROOT / "run.py"), "-m", *overrides], cwd=ROOT)


def places(folder: Path) -> list[str]:
    return [f"paths.victims={folder}/victims", f"paths.results={folder}/results"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A sweep of which two cells of three fail, one by each cause."""
    folder = tmp_path_factory.mktemp("swept")
    done = run(*TINY, "victim.learning_rate=0.1,1e30,-1", *places(folder))
    return folder, done


def test_a_failing_cell_does_not_stop_the_others(swept: tuple[Path, Any]) -> None:
    folder, done = swept
    assert done.returncode == 1, done.stderr
    assert len(list((folder / "results").glob("*/metrics.json"))) == 1
    assert "Traceback" not in done.stderr
    told = done.stderr[done.stderr.index("failed: ") :]
    assert re.search(r"failed: victim.learning_rate=1e\+?30\n  DivergenceError: training", told)
    assert "failed: victim.learning_rate=-1\n  ConfigError: victim.learning_rate=-1" in told
    assert "3 cells, 2 failed" in told


def test_failures_are_recorded_beside_the_results(swept: tuple[Path, Any]) -> None:
    folder, _ = swept
    records = [json.loads(f.read_text()) for f in (folder / "results").glob(".*.failed.json")]
    by_error = {r["error"]: r for r in records}
    assert set(by_error) == {"DivergenceError", "ConfigError"}
    record = by_error["DivergenceError"]
    assert "victim.learning_rate=1e+30" in record["overrides"]
    assert (record["choices"]["attack"], record["seed"]) == ("blend", 0)
    assert not record["config_mistake"]
    assert "DivergenceError" in record["traceback"]
    assert {"time", "host", "pid"} <= record.keys()


def test_status_of_what_was_never_launched(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nosuch: neither a results folder nor"):
        newest("nosuch", tmp_path)


def test_states_of_a_cell(tmp_path: Path) -> None:
    folder = tmp_path / "abc"
    assert state(folder) == "waiting"
    (tmp_path / ".abc.partial").mkdir()
    assert state(folder) == "begun"
    record = {"time": 5.0, "error": "E", "message": "", "overrides": []}
    failure_file(folder).write_text(json.dumps(record))
    with FileLock(tmp_path / ".abc.lock"):
        assert state(folder) == "running"
    assert state(folder) == "failed", "a lock that nobody holds is no running cell"
    assert state(folder, since=5.0) == "failed"
    assert state(folder, since=6.0) == "begun", "launched again: it will be tried again"
    folder.mkdir()
    (folder / "metrics.json").write_text('{"cell": "another"}')
    assert state(folder) == "failed", "the result of another cell is none of this one"
    (folder / "metrics.json").write_text('{"cell": "abc"}')
    assert state(folder) == "done"


def test_states_of_cells_whose_folders_bear_other_names(tmp_path: Path) -> None:
    """``hydra.sweep.subdir=${hydra.job.num}``: whose result it is, not what it is called."""
    place, folder = tmp_path / CELL, tmp_path / "7"
    callback = Sweep(workers=0)
    callback.on_job_start(job(folder))
    assert state(place) == "waiting"
    (tmp_path / ".7.partial").mkdir()
    assert state(place) == "begun"
    with FileLock(tmp_path / ".7.lock"):
        assert state(place) == "running"
    folder.mkdir()
    write_json(folder / "metrics.json", {"cell": "another"})
    assert state(place) == "begun", "another sweep has put its result there"
    write_json(folder / "metrics.json", {"cell": CELL})
    assert state(place) == "done"
    known = {"name": "sweep", "started": 0.0, "results": str(tmp_path), "data": "d"}
    _, over = view(Plan(**known, cells=[["seed=0"]]), [CELL])
    assert over
    callback.on_job_start(job(place))
    assert state(place) == "waiting", "now it is computed under its own name"
    callback.on_job_end(job(place), JobReturn(_return_value=None, status=JobStatus.COMPLETED))


def test_names_of_cells_are_those_of_the_run(swept: tuple[Path, Any]) -> None:
    folder, _ = swept
    plan = newest(str(folder / "results"), Path("nowhere"))
    found = Names(plan).more(float("inf"))
    (done,) = (folder / "results").glob("*/metrics.json")
    assert found[0] == done.parent.name
    assert Names(plan).found == found, "kept beside the plan"
    states = [state(Path(plan.results) / n) for n in found]
    rest = left(plan, [Path(plan.results) / n for n in found], states)
    assert rest is not None
    assert rest.total_seconds() == 0
    table, over = view(plan, found)
    assert over
    shown = "\n".join(map(str, table.columns[0].cells))
    assert "1 of 3 cells done" in shown
    assert "done 1  running 0  failed 2  begun 0  waiting 0" in shown
    assert "failed: victim.learning_rate=-1" in shown


def test_a_relaunch_is_looked_at_anew(tmp_path: Path) -> None:
    known = {"name": "sweep", "results": str(tmp_path), "cells": [["attack=sig"], ["attack=lf"]]}
    plan = Plan(started=1.0, data="old", **known)
    plan.file.parent.mkdir()
    before = Names(plan).more(float("inf"))
    for name in before:
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps({"cell": name}))
    assert view(plan, before)[1]
    again = Plan(started=2.0, data="new", **known)
    assert again.file == plan.file
    assert Names(again).found == [], "the names of an older launch may be those of other configs"
    again.file.with_suffix(".cells").write_text(json.dumps(before))
    assert Names(again).found == [], "the format of an older version"
    record = {"time": 1.5, "error": "E", "message": "", "host": "h", "overrides": []}
    for name in ("a", "b"):
        failure_file(tmp_path / name).write_text(json.dumps(record))
    assert view(plan, ["a", "b"])[1]
    assert not view(again, ["a", "b"])[1], "failures of an older launch end nothing"


@pytest.mark.parametrize("mode", [RunMode.MULTIRUN, RunMode.RUN])
def test_a_record_goes_when_the_cell_succeeds(tmp_path: Path, mode: RunMode) -> None:
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ConfigError("why")
    place = tmp_path / (CELL if mode == RunMode.MULTIRUN else "abc")
    callback = Sweep(workers=0)
    if mode == RunMode.MULTIRUN:
        callback.on_job_start(job(tmp_path / "abc"))
    callback.on_job_end(job(tmp_path / "abc"), failed)
    assert json.loads(failure_file(place).read_text())["message"] == "why"
    assert failed.return_value is None, "the sweeper goes on"
    callback.on_job_end(job(tmp_path / "abc", mode), JobReturn(status=JobStatus.COMPLETED))
    assert not failure_file(place).exists()


def test_a_finished_cell_has_not_failed(tmp_path: Path) -> None:
    known = {"name": "s", "started": 0.0, "results": str(tmp_path), "data": "data"}
    plan = Plan(cells=[["seed=0"]], **known)
    record = {"overrides": ["seed=0"], "time": 1.0, "error": "E", "message": "", "folder": "0"}
    write_json(failure_file(tmp_path / "abc"), record)
    assert len(plan.failures()) == 1
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "metrics.json").write_text('{"cell": "another"}')
    assert len(plan.failures()) == 1, "that result is another cell's"
    (tmp_path / "0" / "metrics.json").write_text('{"cell": "abc"}')
    assert plan.failures() == []


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", "null", "\0\0"])
def test_a_damaged_record_counts_as_a_failure(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(name="s", started=0.0, results=str(tmp_path), data="data", cells=[["seed=0"]])
    failure_file(tmp_path / "abc").write_text(damage)
    (tmp_path / PLANS).mkdir()
    (tmp_path / PLANS / "x.job").write_text(damage)
    assert len(summarize(plan)) == 1
    told = capsys.readouterr().err
    assert f"{failure_file(tmp_path / 'abc')}: damaged record of a failure" in told
    assert "1 cells, 1 failed" in told
    assert state(tmp_path / "abc") == "failed"
    table, over = view(plan, ["abc"])
    assert over
    assert any("damaged record" in str(cell) for cell in table.columns[0].cells)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"name": "s"}'])
def test_a_damaged_plan_is_none(tmp_path: Path, damage: str) -> None:
    known = {"results": str(tmp_path), "data": "data", "cells": [["seed=0"]]}
    plan = Plan(name="s", started=1.0, **known)
    plan.file.parent.mkdir()
    write_json(plan.file, asdict(plan))
    (tmp_path / PLANS / "t-0123.json").write_text(damage)
    assert newest(str(tmp_path), tmp_path) == plan
    plan.file.with_suffix(".cells").write_text(damage)
    assert Names(plan).found == [], "looked for again"
    plan.file.unlink()
    with pytest.raises(FileNotFoundError, match="neither a results folder nor"):
        newest(str(tmp_path), tmp_path)


MEETING = ("hydra.sweep.subdir=${hydra.job.num}",)
"""The first cell of every sweep into these results has folder 0."""


@pytest.mark.long
def test_a_cell_refused_because_its_folder_is_anothers_has_failed(
    swept: tuple[Path, Any], tmp_path: Path
) -> None:
    here = [f"paths.victims={swept[0]}/victims", f"paths.results={tmp_path}"]
    first = run(*TINY, "victim.learning_rate=0.1", *MEETING, *here)
    assert first.returncode == 0, first.stderr
    assert "1 cells, 0 failed" in first.stderr
    other = ["defense=none" if word.startswith("defense=") else word for word in TINY]
    second = run(*other, "victim.learning_rate=0.1", *MEETING, *here)
    assert second.returncode == 2, second.stderr
    assert "1 cells, 1 failed" in second.stderr
    assert "0: holds the result of another config" in second.stderr
    (lost,) = failures([tmp_path], collect([tmp_path])).to_dict("records")
    assert lost["error"] == "ConfigError"
    again = run(*other, "victim.learning_rate=0.1", *MEETING, *here, "force=true")
    assert again.returncode == 0, again.stderr
    assert not list(tmp_path.glob(".*.failed.json"))


def test_a_sweep_that_cannot_write_its_plan_ends(swept: tuple[Path, Any], tmp_path: Path) -> None:
    """Hydra goes on with a warning when a callback fails: then nobody would know of failures."""
    (tmp_path / PLANS).touch()
    done = run(*TINY, "seed=0", f"paths.victims={swept[0]}/victims", f"paths.results={tmp_path}")
    assert done.returncode == 1
    assert re.search(rf"error: {tmp_path}/{PLANS}.*cannot be written \(.*\)", done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_another_folder_for_the_job_moves_no_paths(swept: tuple[Path, Any], tmp_path: Path) -> None:
    """Relative paths are those of the caller: the victim of before is found."""
    shutil.copytree(swept[0] / "victims", tmp_path / "victims")
    options = ["victim.learning_rate=0.1", "paths.victims=victims", "paths.results=r"]
    words = [str(ROOT / "run.py"), *TINY, *options, "hydra.job.chdir=true"]
    for more in ([], ["-m"]):
        done = called([words[0], *more, *words[1:]], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (found,) = (tmp_path / "r").glob("[!.]*/metrics.json")
    assert json.loads(found.read_text())["cached_victim"] is True
    assert not list((tmp_path / "r").rglob("victims"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "hydra.launcher=joblib"], "hydra.launcher=joblib: .*write hydra/launcher=joblib"),
        (["-m", "hydra.run.dir=x"], "hydra.run.dir=x: has no effect with --multirun; .*results=x"),
        (["hydra.mode=MULTIRUN", "hydra.run.dir=x"], "hydra.run.dir=x: has no effect"),
        (["seed=0", "-m", "defense=clp"], "defense=clp: would not be read; .* behind -m"),
        (["seed=0", "--multirun", "defense=clp"], "defense=clp: would not be read"),
        (["-m", "+sweep=quick,cpu"], r"\+sweep=quick,cpu: one sweep at a time"),
        (["-m", "+sweep=quick", "+sweep=cpu"], r"\+sweep=quick,cpu: one sweep at a time"),
        (["+sweep=quick"], r"\+sweep=quick: has no effect without --multirun; add -m"),
        (["hydra/launcher=joblib", "seed=0"], "hydra/launcher=joblib: has no effect without"),
        (["hydra.sweep.dir=x", "seed=0"], "hydra.sweep.dir=x: has no effect without"),
        (["-m", "+hydra.launcher=joblib"], r"\+hydra.launcher=joblib: .*hydra/launcher=joblib"),
        (["-m", "seed=0,1", "seed=2"], "seed=0,1 seed=2: given twice; write seed=0,1,2"),
        (["-m", "seed=range(0,3)", "seed=1"], r"seed=range\(0,3\) seed=1: given twice"),
        (["+defence=clp"], "nothing reads defence; did you mean defense=clp"),
        (["++attacks.target_class=1"], "nothing reads attacks.target_class"),
        (["+paths.result=x"], "nothing reads paths.result; did you mean paths.results=x"),
        (["+checkpoint=a.pt"], "nothing reads checkpoint; write task=purify checkpoint=a.pt"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_would_be_ignored_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        refuse_ignored(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "+sweep=quick", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["seed=0,1", "-m"],
        ["--multi", "+sweep=quick"],
        ["--cfg", "job", "hydra/launcher=joblib"],
        ["hydra/launcher=joblib", "-c", "job"],
        ["seed=0", "hydra.run.dir=x"],
        ["-m", "hydra.sweep.dir=x", "data.root=a=b"],
        ["+experiment=cpu_badnets", "+trainer.threads=1", "+logger=null", "++seed=1"],
        ["task=purify", "++checkpoint=a.pt", "+schedule@attack.late=cosine"],
        ["--multirun", "seed=0,1", "--multirun"],
        ["+my.rate=0.1", "attack.poison_rate=${my.rate}"],
        ["-m", "seed=0,1", "seed=0,1"],
        ["-m", "model.widths=[16,24]", "seed=0", "seed=1,2", "model.widths=[8,16]"],
    ],
    ids=" ".join,
)
def test_what_means_something_passes(words: list[str]) -> None:
    refuse_ignored(words)
    with pytest.raises(ConfigError):  # whatever else is there, a mistake is seen
        refuse_ignored(["hydra.launcher=joblib", *words])


def test_a_value_that_a_later_one_replaces_is_told(caplog: pytest.LogCaptureFixture) -> None:
    refuse_ignored(["seed=0", "defense=clp", "seed=1"])
    assert caplog.messages == ["seed=0: replaced by the later seed=1"]


def test_a_mistake_on_the_command_line_ends_with_status_2(tmp_path: Path) -> None:
    done = called([str(ROOT / "run.py"), "seed=0", "-m", "defense=clp"], cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: defense=clp: would not be read")


def test_a_note_outlives_a_killed_process_alone(tmp_path: Path) -> None:
    callback = Sweep(workers=0)
    callback.on_job_start(job(tmp_path / "abc"))
    (note,) = (tmp_path / PLANS).glob("*.job")
    record_lost_jobs(tmp_path)
    assert not failure_file(tmp_path / CELL).exists(), "we live"
    text = note.read_text()
    callback.on_job_end(job(tmp_path / "abc"), JobReturn(status=JobStatus.COMPLETED))
    assert not note.exists()
    note.write_text(text)  # as if we had been killed
    record_lost_jobs(tmp_path)
    record = json.loads(failure_file(tmp_path / CELL).read_text())
    assert record["message"] == f"process {os.getpid()} died while computing this cell"
    assert not note.exists()
    note.write_text(text)
    write_json(
        failure_file(tmp_path / CELL), record | {"time": record["time"] + 1, "message": "new"}
    )
    record_lost_jobs(tmp_path)
    assert json.loads(failure_file(tmp_path / CELL).read_text())["message"] == "new"


def test_what_killed_processes_had_begun_to_write_goes(tmp_path: Path) -> None:
    (tmp_path / PLANS).mkdir()
    host, dead = os.uname().nodename, subprocess.Popen(["true"])
    dead.wait()
    gone = [tmp_path / f".a{SUFFIX}.{host}.{dead.pid}.new"]
    gone += [tmp_path / PLANS / f"s.json.{host}.{dead.pid}.new"]
    kept = [tmp_path / f".a{SUFFIX}.{host}.{os.getpid()}.new"]
    kept += [tmp_path / f".a{SUFFIX}.another.{dead.pid}.new", tmp_path / "theirs.new"]
    for file in (*gone, *kept):
        file.touch()
    record_lost_jobs(tmp_path)
    assert [f.exists() for f in (*gone, *kept)] == [False, False, True, True, True]
    write_json(tmp_path / "b.json", 1)
    assert len(list(tmp_path.glob("b.json*"))) == 1


@pytest.mark.long
def test_a_killed_worker_and_what_failed_before_it_are_told(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    sweep = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", *TINY, *places(tmp_path)]
    sweep += ["victim.learning_rate=-1,0.1"]
    process = started(*sweep)
    results, found = tmp_path / "results", {"pid": 0}
    while process.poll() is None:
        notes = [n.read_text() for n in (results / PLANS).glob("*.job")]
        found = next((json.loads(n) for n in notes if "learning_rate=0.1" in n), found)
        if found["pid"] and list(results.glob(".*.failed.json")):
            os.kill(found["pid"], signal.SIGKILL)
            break
        time.sleep(0.05)
    _, told = process.communicate()
    assert process.returncode == 1, told
    assert "failed: victim.learning_rate=-1\n  ConfigError: " in told
    lost = f"LostError: process {found['pid']} died while computing this cell"
    assert f"failed: victim.learning_rate=0.1\n  {lost}" in told
    assert "2 cells, 2 failed" in told
    assert "error: a worker was lost" in told
    again = run(*sweep)
    assert again.returncode == 2, "only the config mistake is left"
    assert "2 cells, 1 failed" in again.stderr
    assert len(list(results.glob(".*.failed.json"))) == 1


@pytest.mark.long
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_two_sweeps_at_once_compute_each_cell_once(tmp_path: Path, launcher: str) -> None:
    cells = [*TINY, "victim.learning_rate=0.05,0.1,0.15", *places(tmp_path)]
    options = []
    if launcher == "joblib":
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
        options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    both = [started(*cells), started(*options, *cells)]
    shown = "".join(p.communicate()[0] for p in both)
    assert [p.returncode for p in both] == [0, 0]
    assert shown.count("(report.html inside)") == 3
    assert shown.count("(already there;") == 3
    done = {f.parent for f in (tmp_path / "results").glob("*/metrics.json")}
    assert len(done) == 3
    assert all(shown.count(f"{f} (report.html inside)") == 1 for f in done)


@pytest.mark.long
def test_joblib_gives_the_numbers_of_basic(swept: tuple[Path, Any], tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = run(*options, *TINY, "victim.learning_rate=0.1", "seed=0,-1", *places(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "2 cells, 1 failed" in done.stderr
    (one,) = (swept[0] / "results").glob("*/metrics.json")
    (other,) = (tmp_path / "results").glob("*/metrics.json")
    a, b = json.loads(one.read_text()), json.loads(other.read_text())
    assert all(a[k] == b[k] for k in ("cell", "victim", "purified", "counts"))


def test_a_launcher_that_is_not_installed(tmp_path: Path) -> None:
    if subprocess.run([sys.executable, "-c", "import hydra_plugins.hydra_ray_launcher"]).returncode:
        done = run("hydra/launcher=ray", "seed=0,1", *places(tmp_path))
        assert done.returncode == 2
        assert 'pip install "dhbe[ray]"' in done.stderr
        assert not (tmp_path / "results").exists()
    else:
        pytest.skip("hydra-ray-launcher is installed here")


def test_slots_are_held_by_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("dhbe.sweeping.workers._held", held := [])
    assert [take_slot(), take_slot()] == [0, 1]
    code = "from dhbe.sweeping.workers import take_slot; print(take_slot())"
    other = [sys.executable, "-c", code]
    free = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=True)
    assert free.stdout == "2\n"
    held.pop(0).release()
    assert take_slot(limit=1) == 0, "the lowest free one; that of the dead process was freed"


SWEEPS = sorted(p.stem for p in (ROOT / "sweeps").glob("*.yaml"))
"""Those of the issue, and more."""


def test_the_sweeps_of_the_docs_are_there() -> None:
    wanted = {"quick", "attacks_cpu", "defenses_cpu", "dhbe_ablation", "poison_rate"}
    assert wanted | {"clean_budget", "paper_cifar10", "paper_gtsrb"} <= set(SWEEPS)
    assert names("sweep") == SWEEPS


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_says_what_it_is_for(name: str) -> None:
    text = (CONF / "sweep" / f"{name}.yaml").read_text()
    assert all(f"# {word}: " in text for word in ("Claim", "Command"))
    assert "Cost: " in text
    assert re.search(r"# .*\bExpectation\b.*: .*\d|Expectation: docs/results/", text)


def test_quick_is_small_and_reproducible() -> None:
    text = (ROOT / "sweeps" / "quick.yaml").read_text()
    params = yaml.safe_load(text)["hydra"]["sweeper"]["params"]
    overrides = [f"{k}={v}" for k, v in params.items()]
    sizes = [
        len(list(o.sweep_string_iterator()))
        for o in OverridesParser.create().parse_overrides(overrides)
        if o.is_sweep_override()
    ]
    assert sizes == [3, 3, 3]
    assert params["trainer.threads"] == 1, "or launchers would differ in the last digits"


def test_a_plan_meets_itself(tmp_path: Path) -> None:
    cells = [["defense=clp", "seed=0"], ["defense=clp", "seed=1"]]
    known = {"name": "quick", "results": str(tmp_path), "data": "data", "cells": cells}
    a, b = Plan(started=1.0, **known), Plan(started=2.0, **known)
    assert a.file == b.file
    assert a.label(cells[1]) == "seed=1"
    assert Plan(started=1.0, **known | {"cells": cells[:1]}).file != a.file
