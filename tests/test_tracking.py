"""Loggers, for real and offline: what they wrote is read back."""

from __future__ import annotations

import errno
import json
import logging
import pickle
import socket
import struct
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pytest
from omegaconf import DictConfig

from dhbe.config.identity import cell_name
from dhbe.config.schema import plain
from dhbe.core.errors import ConfigError, DHBEError
from dhbe.experiment import pipeline, trackers
from dhbe.experiment.tracking import RowsLogger, report, tracked
from dhbe.sweeping.callback import Sweep
from tests.conftest import ROOT
from tests.support.commands import Command, called
from tests.support.launch import continued, job
from tests.support.wandb_server import WandbServer

METRICS = {
    "victim": {"acc": 0.7, "asr": 1.0, "asr_conditional": None},
    "purified": {"acc": 0.6, "asr": 0.1, "asr_conditional": None},
    "der": 0.85,
    "seconds": {"victim": 1.0, "defense": 2.0, "evaluate": 3.0},
}
CHOICES = {
    **{"data": "cifar10_mini", "model": "resnet_tiny", "attack": "badnets"},
    **{"defense": "clp", "budget": "none", "sweep": "quick"},
}
PICTURES = {"patches_0001": np.zeros((3, 3, 5, 5), dtype=np.uint8)}
Compose = Callable[..., DictConfig]


def run(tree: dict[str, Any], choices: dict[str, str] = CHOICES) -> None:
    with tracked(tree, choices, Path(tree["paths"]["results"]) / "partial") as logger:
        assert logger is not None
        logger.log_metrics({"student/distill": 0.5}, step=1)
        report(logger, METRICS, PICTURES)


def records(file: Path) -> Iterator[Any]:
    """Records of a ``.wandb`` file: a LevelDB log (32 KiB blocks) of protobuf messages."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, place, message = file.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole message, or the last part of one
            yield pb.Record.FromString(message)
            message = b""


def written(file: Path) -> list[Any]:
    """All records; wandb's own process may still be writing when a run has been finished."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        found = list(records(file))
        if any(r.WhichOneof("record_type") == "exit" for r in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{file}: never closed")


@pytest.mark.long
def test_wandb_groups_the_cells_of_a_sweep_without_name(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_RUN_GROUP", "before")
    monkeypatch.delenv("WANDB_RUN_GROUP")
    callback = Sweep(workers=0)
    callback.group = "sweep-0123"
    callback = pickle.loads(pickle.dumps(callback))  # as it travels to a worker
    callback.on_job_start(job(tmp_path / "abc"))
    nameless = {k: v for k, v in CHOICES.items() if k != "sweep"}
    run(plain(compose_config("logger=wandb", "logger.offline=true")), nameless)
    (file,) = tmp_path.rglob("run-*.wandb")
    (about,) = [r.run for r in written(file) if r.WhichOneof("record_type") == "run"]
    assert about.run_group == "sweep-0123"


@pytest.mark.long
def test_wandb_offline(compose_config: Compose, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for seed in (0, 1):
        run(plain(compose_config("logger=wandb", "logger.offline=true", f"seed={seed}")))
    files = sorted(tmp_path.rglob("run-*.wandb"))
    assert len({f.name for f in files}) == 2, "each run has its own entry: the first was closed"
    seeds = set()
    for file in files:
        found = written(file)
        (about,) = [r.run for r in found if r.WhichOneof("record_type") == "run"]
        assert about.run_group == "quick"
        assert set(about.tags) >= {"attack:badnets", "defense:clp"}
        config = {c.key: json.loads(c.value_json) for r in found for c in r.config.update if c.key}
        assert config["attack"]["_target_"] == "attacks.badnets.BadNets"
        seeds.add(config["seed"])
        history: dict[str, Any] = {}
        for record in found:
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                history[name] = json.loads(item.value_json)
        assert history["student/distill"] == 0.5
        assert (history["victim/asr"], history["purified/asr"]) == (1.0, 0.1)
        assert "victim/asr_conditional" not in history
        assert any(k.startswith("pictures/patches_0001") for k in history)
    assert seeds == {0, 1}


def test_csv_is_the_default_and_keeps_the_rows_of_a_killed_attempt(
    compose_config: Compose, tmp_path: Path
) -> None:
    tree = plain(compose_config())
    assert cell_name(tree) == cell_name(plain(compose_config("logger=none")))
    folder = tmp_path / "partial"
    with pytest.raises(InterruptedError), tracked(tree, CHOICES, folder) as logger:
        killed(logger)
    with tracked(tree, CHOICES, folder) as logger:
        assert logger is not None
        logger.log_metrics({"student/distill": 0.25}, step=2)
        logger.log_metrics({"val/acc": 0.9}, step=2)
        report(logger, METRICS, PICTURES)
        folder.rename(tmp_path / "abc")  # the result gets its name
    table = pd.read_csv(tmp_path / "abc" / "log.csv")
    assert table["student/distill"].dropna().tolist() == [0.75, 0.5, 0.25]
    assert table["val/acc"].dropna().tolist() == [0.9]
    assert table["purified/asr"].dropna().tolist() == [0.1]
    assert not folder.exists(), "closing writes nothing more"
    assert [f.name for f in (tmp_path / "abc").iterdir()] == ["log.csv"]


@pytest.mark.long
def test_rows_of_a_run_that_was_really_killed(tmp_path: Path) -> None:
    epochs = 12
    tiny = ["data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "trainer.threads=1"]
    command = [str(ROOT / "run.py"), *tiny, f"victim.epochs={epochs}"]
    command += ["defense=clp", f"paths.victims={tmp_path}/v", f"paths.results={tmp_path}/results"]
    process = Command(command, cwd=tmp_path)
    while process.poll() is None and not list(tmp_path.glob("v/.*.partial/last.ckpt")):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert not logs(tmp_path), "it was killed in mid-training"
    assert called(command, cwd=tmp_path).returncode == 0
    assert continued(tmp_path)
    (file,) = logs(tmp_path)
    table = pd.read_csv(file)
    assert len(table["victim/loss"].dropna()) >= epochs - 1, "a kill may come just before a row"


def logs(folder: Path) -> list[Path]:
    return list((folder / "results").glob("[0-9a-f]*/log.csv"))


def killed(logger: Any) -> None:
    """Two epochs, as Lightning logs them."""
    for step, value in enumerate((0.75, 0.5)):
        logger.log_metrics({"student/distill": value}, step=step)
        logger.save()
    raise InterruptedError


def test_tensorboard(compose_config: Compose, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tree = plain(compose_config("logger=tensorboard"))
    run(tree)
    events = EventAccumulator(str(tmp_path / "results" / "tensorboard" / cell_name(tree))).Reload()
    assert [round(e.value, 6) for e in events.Scalars("purified/asr")] == [0.1]
    assert events.Tags()["images"] == ["pictures/patches_0001"]


def test_a_logger_that_is_not_installed(
    compose_config: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pytorch_lightning.loggers.tensorboard as module

    monkeypatch.setattr(module.TensorBoardLogger, "__init__", missing)
    tree = plain(compose_config("logger=tensorboard"))
    with (
        pytest.raises(ConfigError, match=r"logger=tensorboard: .*dhbe\[tensorboard\]"),
        tracked(tree, {"logger": "tensorboard"}, Path("nowhere")),
    ):
        pass


def missing(*args: Any, **kwargs: Any) -> None:
    raise ModuleNotFoundError("Neither `tensorboard` nor `tensorboardX` is available.")


# ---------------------------------------------------------------- what trackers lack, or do


def silent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, **more: str) -> None:
    """A machine whose user never called wandb."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in more.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def server() -> Iterator[str]:
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
def answering() -> Iterator[str]:
    """Answers, if only that it does not understand."""
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.mark.parametrize("kind", ["hanging", "refused", "unknown host"])
def test_wandb_without_network_ends_in_seconds_with_the_remedy(
    compose_config: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    kind: str,
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(trackers, "SECONDS", 1)
    url = {"hanging": server, "refused": "http://127.0.0.1:9", "unknown host": "http://no.invalid"}
    silent(monkeypatch, tmp_path, WANDB_BASE_URL=url[kind], WANDB_API_KEY="a" * 40)
    wandb.teardown()  # it reads the environment once
    begun = []
    monkeypatch.setattr(wandb, "init", lambda **_: begun.append(1))
    start = time.monotonic()
    with pytest.raises(DHBEError, match=r"logger=wandb: http.* does not answer .*offline=true"):
        run(plain(compose_config("logger=wandb")))
    assert time.monotonic() - start < 15
    assert not begun, "nothing is begun, in clean-up neither"
    wandb.teardown()


def test_wandb_without_key_says_so(
    compose_config: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answering: str
) -> None:
    wandb = pytest.importorskip("wandb")
    silent(monkeypatch, tmp_path, WANDB_BASE_URL=answering)
    wandb.teardown()
    tried = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: tried.append(options) or init(**options))
    with pytest.raises(ConfigError, match=r"no key: call `wandb login`, or set logger.offline"):
        run(plain(compose_config("logger=wandb")))
    assert len(tried) == 1, "not once more in clean-up"
    assert tried[0]["settings"]["init_timeout"] <= 10
    assert tried[0]["settings"]["finish_timeout"] <= 30
    wandb.teardown()


@pytest.mark.long
@pytest.mark.parametrize("lost", ["server", "process"])
def test_wandb_lost_in_the_midst_of_a_run_costs_no_result(
    compose_config: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    lost: str,
) -> None:
    """The server goes, or wandb's own process is killed; the next run has another one."""
    wandb = pytest.importorskip("wandb")
    server = WandbServer()
    silent(monkeypatch, tmp_path, WANDB_BASE_URL=server.url, WANDB_API_KEY="a" * 40)
    monkeypatch.setattr(trackers, "SECONDS", 1)
    monkeypatch.setattr(trackers, "LIMITS", trackers.LIMITS | {"finish_timeout": 1})
    wandb.teardown()
    folder = tmp_path / "partial"
    start = 0.0
    with caplog.at_level(logging.WARNING):
        with tracked(plain(compose_config("logger=wandb")), CHOICES, folder) as logger:
            assert logger is not None
            logger.log_metrics({"student/distill": 0.5}, step=1)
            if lost == "server":
                server.lose()
            else:
                process = wandb.setup().ensure_service()._proc._process
                process.kill()
                process.wait(10)
            start = time.monotonic()
            logger.log_metrics({"student/distill": 0.4}, step=2)
            report(logger, METRICS, PICTURES)
        assert time.monotonic() - start < 30
    told = [r.getMessage() for r in caplog.records if "goes on without it" in r.getMessage()]
    assert len(told) == 1, told
    run(plain(compose_config("logger=wandb", "logger.offline=true")))
    assert len(list(tmp_path.rglob("offline-run-*/run-*.wandb"))) == 1
    wandb.teardown()


@pytest.mark.parametrize("failing", ["log_metrics", "log_hyperparams", "save", "finalize"])
def test_a_logger_that_fails_costs_no_result(
    compose_config: Compose,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "log.csv")

    monkeypatch.setattr(RowsLogger, failing, fail)
    tiny = ("data.limit=100", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=2")
    config = compose_config(*tiny, "defense=clp", "trainer.threads=1")
    with caplog.at_level(logging.WARNING):
        found = pipeline.run(config, tmp_path / "out", {**CHOICES, "logger": "csv"})
    assert (tmp_path / "out" / "metrics.json").exists()
    assert found["victim"]["acc"] is not None
    told = [r.getMessage() for r in caplog.records if "goes on without it" in r.getMessage()]
    assert len(told) == 1, "once, not in every step"
    assert told[0].startswith("logger=csv: ")
    assert "log.csv: cannot be written (No space left on device)" in told[0]
