"""Faults of the machine, made to happen: clear message, exit status, nothing half-written."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import tarfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dhbe.checkpoint import CheckpointFile
from dhbe.core.errors import ArtefactError, ConfigError, DataError
from dhbe.data import OwnImages, Resident
from dhbe.data.sources import Torchvision
from dhbe.evaluation.evaluator import Evaluator
from dhbe.experiment import contents, pipeline
from dhbe.experiment.folder import ResultFolder
from tests.conftest import ROOT
from tests.support.cli import TINY, metrics, run
from tests.support.commands import Command
from tests.support.fixtures import make_spec, small

LONG = (*TINY[:3], "victim.epochs=30", "trainer.threads=1", "defense=clp", "hydra.run.dir=out")
CHOICES = {"data": "tiny", "model": "resnet_tiny", "attack": "badnets", "defense": "clp"}


def started(folder: Path, *overrides: str, **options) -> Command:
    words = [str(ROOT / "run.py"), f"paths.victims={folder}/victims", *overrides]
    return Command(words, cwd=folder, **options)


def in_training(folder: Path, *overrides: str, **options) -> Command:
    """A run whose victim has finished its first epoch."""
    process = started(folder, *LONG, *overrides, **options)
    while process.poll() is None and not list(folder.glob("victims/.*.partial/last.ckpt")):
        time.sleep(0.05)
    return process


def attentive() -> None:
    """A background shell, as in CI, makes its children deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stop_in_training(folder: Path, number: signal.Signals) -> tuple[int | None, str]:
    """Send the signal when the first epoch of the victim is on disk."""
    process = in_training(folder, before=attentive)
    process.send_signal(number)
    _, said = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.parametrize(
    ("number", "status"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 143, id="SIGTERM", marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, -9, id="SIGKILL", marks=pytest.mark.long),
    ],
)
def test_a_stopped_run_can_be_continued(tmp_path: Path, number, status: int) -> None:
    code, said = stop_in_training(tmp_path, number)
    assert code == status, said
    if number != signal.SIGKILL:
        assert "the same command continues from there" in said
        assert "Traceback" not in said
    assert not (tmp_path / "out" / "metrics.json").exists(), "nothing looks finished"
    (state,) = tmp_path.glob("victims/.*.partial/last.ckpt")
    assert torch.load(state, weights_only=True)["epoch"] >= 0
    if number == signal.SIGKILL:  # the lock of the dead process holds nobody up
        done = run(tmp_path, *LONG)
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "metrics.json").exists()
        assert not list(tmp_path.glob("victims/.*.partial"))


def small_disk() -> None:
    """No file may grow beyond 64 kB: what a full disk does to the first large one."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def test_a_disk_that_fills_up_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """No file may grow beyond 64 kB: what a full disk does to the first large one."""
    process = started(tmp_path, *LONG, before=small_disk)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert "error: " in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert not [p for p in (tmp_path / "victims").glob("[!.]*")]


@pytest.mark.parametrize("key", ["hydra.run.dir", "paths.victims"])
def test_places_that_cannot_be_written_are_named(tmp_path: Path, key: str) -> None:
    """/proc takes no folders, not even root's."""
    places = {"hydra.run.dir": "out", "paths.victims": str(tmp_path)} | {key: "/proc/dhbe"}
    done = started(tmp_path, *LONG[:-1], *(f"{k}={v}" for k, v in places.items()))
    _, said = done.communicate(timeout=120)
    assert done.returncode == 1, said
    assert re.search(rf"error: .*/proc/dhbe.*({key}|cannot be written)", said)
    assert "Traceback" not in said


def small_memory() -> None:
    """4 GB of data at most."""
    resource.setrlimit(resource.RLIMIT_DATA, (2**32, 2**32))


@pytest.mark.long
def test_running_out_of_memory_says_what_to_do(tmp_path: Path) -> None:
    """A batch that needs ten times the memory."""
    large = ("model.widths=[512,512]", "victim.batch_size=6840", "data.limit=0")
    process = started(tmp_path, *LONG[4:], *large, "trainer.threads=1", before=small_memory)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    assert re.search(r"out of memory \(.*\); lower defense.batch_size or victim.batch_size", said)
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_a_folder_deleted_during_the_run_comes_back(tmp_path: Path) -> None:
    process = in_training(tmp_path)
    for folder in (".out.partial", "out", "victims"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (tmp_path / "out" / "report.html").exists()
    assert len(list((tmp_path / "victims").glob("[!.]*/victim.safetensors"))) == 1


@pytest.mark.long
def test_two_processes_make_one_victim(tmp_path: Path) -> None:
    first = in_training(tmp_path)
    second = started(tmp_path, *LONG[:-2], "defense=none", "hydra.run.dir=second")
    said = [p.communicate(timeout=200)[1] for p in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    rates = [metrics(tmp_path / f)["victim"] for f in ("out", "second")]
    assert rates[0] == rates[1]
    assert [metrics(tmp_path / f)["cached_victim"] for f in ("out", "second")] == [False, True]


def test_a_clock_that_is_set_back_does_no_harm(tmp_path: Path, compose_config, monkeypatch) -> None:
    """Every look at the calendar is an hour before the last; durations do not come from it."""
    now = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: next(now))
    short = (*LONG[:3], "victim.epochs=1", "defense=clp")
    found = pipeline.run(compose_config(*short), tmp_path / "out", CHOICES)
    assert all(0 <= seconds < 100 for seconds in found["seconds"].values())
    again = pipeline.run(compose_config(*short), tmp_path / "out", CHOICES)
    assert again == json.loads(json.dumps(found))


def test_the_remains_of_another_run_are_not_continued(tmp_path: Path) -> None:
    folder = ResultFolder(tmp_path / "out")
    state = folder.open("one") / "training" / "last.ckpt"
    state.parent.mkdir()
    state.touch()
    with folder.claimed():
        assert folder.open("one") == folder.partial
    assert state.exists(), "the same run goes on"
    with folder.claimed():
        folder.open("another")
        assert not state.exists()
    assert not folder.partial.exists()


@pytest.mark.parametrize("content", [b"", b'{"cell": ', b"[]", b"\xff\x00"])
def test_a_damaged_result_is_named_and_force_replaces_it(
    tmp_path: Path, compose_config, content: bytes
) -> None:
    short = (*LONG[:3], "victim.epochs=1", "defense=clp")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"out/metrics.json: damaged result .* force=true"):
        pipeline.run(compose_config(*short), tmp_path / "out", CHOICES)
    found = pipeline.run(compose_config(*short, "force=true"), tmp_path / "out", CHOICES)
    assert metrics(tmp_path / "out")["cell"] == found["cell"]


@pytest.mark.parametrize("change", ["deleted", "replaced"])
def test_a_checkpoint_gone_at_the_end_costs_no_weights(
    tmp_path: Path, compose_config, monkeypatch, change: str
) -> None:
    file = tmp_path / "given.pt"
    torch.save(small(1).network.state_dict(), file)
    options = ("model=resnet_tiny", "model.widths=[16,24]", "model.blocks=1", "data.image_size=16")
    task = ("task=purify", f"checkpoint={file}", *options, "defense=clp", "probe.steps=1")
    save_file = contents.save_file

    def interrupted(*args, **kwargs) -> None:
        save_file(*args, **kwargs)
        file.unlink()
        if change == "replaced":
            torch.save(small(2).network.state_dict(), file)

    monkeypatch.setattr(contents, "save_file", interrupted)
    with pytest.raises(ArtefactError, match=r"purified weights are in (\S+)\)") as error:
        pipeline.run(compose_config(*task), tmp_path / "out", CHOICES)
    assert ("no such file" if change == "deleted" else "changed during") in str(error.value)
    kept = Path(re.search(r"weights are in (\S+)\)", str(error.value))[1])
    CheckpointFile(path=str(kept)).load_into(small(3))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["GPU", "CPU"],
)
def test_evaluation_halves_its_batch_when_memory_runs_out(error: RuntimeError) -> None:
    class Small(torch.nn.Module):
        """A device with room for 100 images."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > 100:
                raise error
            return x.mean((2, 3))

    pixels = torch.randint(0, 256, (300, 3, 16, 16), dtype=torch.uint8)
    test = Resident(pixels, torch.zeros(300, dtype=torch.int64))
    evaluator = Evaluator(test, None, device=torch.device("cpu"))
    found = evaluator.predict(Small().eval()).clean
    assert (found == pixels.float().mean((2, 3)).argmax(1).numpy()).all()


# ---------------------------------------------------------------- a user's own images


def own(folder: Path, **changes) -> OwnImages:
    spec = make_spec()
    known = {"classes": 3, "channels": 3, "image_size": spec.image_size, "normalization": "half"}
    known |= {"order": None, "content": ""}
    known |= {"name": "own", "flip": False, "crop_padding": 0, "clean": None, "test": str(folder)}
    return OwnImages(**(known | {"skip_unreadable": False} | changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label in ("0", "2"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / label / f"{i}.png")
    return tmp_path


def truncate(file: Path) -> None:
    Image.effect_noise((64, 64), 90).save(file, "PNG")
    file.write_bytes(file.read_bytes()[:500])


def animate(file: Path) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])


def bomb(file: Path) -> None:
    """20,000 x 20,000 pixels in 50 kB."""
    Image.new("1", (20_000, 20_000)).save(file, "PNG")


BAD = {
    "truncated": (truncate, "not a readable image"),
    "animated": (animate, "animated; which frame is meant"),
    "bomb": (bomb, "not a readable image"),
    "empty": (lambda f: f.write_bytes(b""), "not a readable image"),
    "a program": (lambda f: Image.new("RGB", (8, 8)).save(f, "EPS"), "not a readable image"),
    "sparse": (lambda f: os.truncate(f, 2**40), "more than .* bytes"),
    "text": (lambda f: f.write_text("no image"), "not a readable image"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_named_and_skipped_only_when_asked(folder: Path, kind: str) -> None:
    make, message = BAD[kind]
    (folder / "2" / "bad.png").touch()
    make(folder / "2" / "bad.png")
    with pytest.raises(DataError, match=rf"bad.png: .*{message}.*data.skip_unreadable=true"):
        own(folder).load()
    images = own(folder, skip_unreadable=True)
    splits = images.load()
    assert splits is not None
    assert splits.test.labels.tolist() == [0, 0, 2, 2]
    assert splits.skipped == (str(folder / "2" / "bad.png"),)


def test_only_colour_images_have_an_order(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.order=bgr: expected rgb .*data.channels=1"):
        own(folder, order="bgr", channels=1)


def test_folders_that_are_not_the_classes_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"sub-folder 2, but the network has classes 0..1"):
        own(folder, classes=2).load()
    (folder / "2").rename(folder / "dog")
    with pytest.raises(DataError, match="2 sub-folders for 3 classes"):
        own(folder).load()
    assert own(folder, classes=2).load().test.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="expected a folder with one sub-folder per class"):
        own(folder / "absent").load()


def test_an_interrupted_download_is_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that hangs up half-way, for real; the same call then fetches the rest."""
    parts = {"data_batch_1": {"data": np.zeros((2, 3072), np.uint8), "labels": [3, 4]}}
    parts["batches.meta"] = {"label_names": list("abcdefghij")}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as archive:
        for name, content in parts.items():
            blob = pickle.dumps(content)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(blob)
            archive.addfile(info, io.BytesIO(blob))
    whole = raw.getvalue()
    sums = {n: hashlib.md5(pickle.dumps(c)).hexdigest() for n, c in parts.items()}
    half, full = len(whole) // 2, len(whole)
    lengths = iter([half, half, full, full])  # it looks for a redirection first

    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(whole[: next(lengths)])

        def log_message(self, *_: object) -> None:
            pass

    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(whole).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(cifar, "test_list", [])
    monkeypatch.setattr(cifar, "meta", cifar.meta | {"md5": sums["batches.meta"]})
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar, "url", f"http://127.0.0.1:{server.server_port}/cifar.tar.gz")
        source = Torchvision(
            dataset="CIFAR10",
            root=str(tmp_path),
            download=True,
            train={"train": True},
            test={"train": False},
        )
        with pytest.raises(DataError, match="CIFAR10 is not there"):
            source.load("train", channels=3, size=32, stream=False)
        found = source.load("train", channels=3, size=32, stream=False)
        server.shutdown()
    assert found.labels.tolist() == [3, 4]
