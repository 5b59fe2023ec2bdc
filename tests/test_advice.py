"""One line for each failure of the machine: path, read or written, cause, remedy."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dhbe.core import exit_status
from dhbe.core.advice import advice
from dhbe.core.durable import writing
from dhbe.core.errors import out_of_memory


def failure(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011 - which one is what we ask
        act()
    return found.value


READ = {
    "read_text": lambda p: (p / "absent.yaml").read_text(),
    "open": lambda p: (p / "absent.yaml").open(),
    "in C": lambda p: open(p / "absent.yaml"),  # noqa: SIM115
    "a folder": lambda p: (p / "folder").read_bytes(),
    "an image": lambda p: Image.open(p / "absent.png"),
    "pandas": lambda p: pd.read_csv(p / "absent.csv"),
    "iterdir": lambda p: list((p / "absent").iterdir()),
    "below a file": lambda p: (p / "file" / "x").read_text(),
}
WRITTEN = {
    "write_text": lambda p: (p / "absent" / "x").write_text(""),
    "open": lambda p: (p / "absent" / "x").open("ab"),
    "mkdir": lambda p: (p / "file" / "x").mkdir(),
    "makedirs": lambda p: os.makedirs(p / "file" / "x"),
    "replace": lambda p: (p / "absent").replace(p / "x"),
    "move": lambda p: shutil.move(p / "absent", p / "x"),
    "numpy": lambda p: np.savez(p / "absent" / "x.npz", a=1),
    "pandas": lambda p: pd.DataFrame({"a": [1]}).to_csv(p / "file" / "x.csv"),
    "an image": lambda p: Image.new("L", (2, 2)).save(p / "absent" / "x.png"),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("kind", READ)
def test_what_could_not_be_read_is_no_output_problem(place: Path, kind: str) -> None:
    said = advice(failure(lambda: READ[kind](place)))
    assert said.startswith(f"{place}/"), said
    assert ": cannot be read (" in said
    assert "check that it is there and that you may read it" in said
    assert "space" not in said


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_could_not_be_written_is_named(place: Path, kind: str) -> None:
    said = advice(failure(lambda: WRITTEN[kind](place)))
    assert str(place) in said
    assert ": cannot be written (" in said
    assert "paths.results or paths.victims" in said


def test_a_copy_that_finds_no_room_names_where_it_was_to_be() -> None:
    """``shutil`` names both; what can be read is not the trouble."""
    error = OSError(errno.ENOSPC, "No space left on device", "/tmp/state", None, "/full/last.new")
    assert advice(error).startswith("/full/last.new: cannot be written (No space left on device)")


def test_weights_that_find_no_room_are_named(tmp_path: Path) -> None:
    """safetensors tells the number of the error alone."""

    def save() -> None:
        with writing(tmp_path / "absent" / "x.safetensors"):
            save_file({"a": torch.ones(1)}, tmp_path / "absent" / "x.safetensors")

    assert advice(failure(save)).startswith(f"{tmp_path}/absent/x.safetensors: cannot be ")

    def fill() -> None:
        with writing(tmp_path / "x"):
            raise RuntimeError("I/O error: No space left on device (os error 28)")

    assert advice(failure(fill)).startswith(f"{tmp_path}/x: cannot be written (No space left")


def test_a_full_disk() -> None:
    def fill() -> None:
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    said = advice(failure(fill))
    assert "cannot be written (No space left on device); free space or inodes" in said


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.ENFILE, "too many open files"),
        (errno.EIO, "the disk or the network share fails"),
        (errno.ESTALE, "the network share was lost"),
        (errno.EAGAIN, "raise `ulimit -u`"),
        (errno.ENOMEM, "lower defense.batch_size"),
        (errno.EDQUOT, "free space or inodes"),
    ],
)
def test_limits_of_the_machine_have_their_own_advice(number: int, remedy: str) -> None:
    said = advice(OSError(number, os.strerror(number)))
    assert remedy in said
    assert os.strerror(number) in said


def test_threads_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")  # CPython's words

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert "lower trainer.threads" in advice(failure(threading.Thread().start))
    assert out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert out_of_memory(RuntimeError("std::bad_alloc"))
    loading = ImportError("libtorch.so: failed to map segment from shared object")
    assert advice(loading).endswith("raise `ulimit -v`")


def test_mistakes_of_the_program_have_none() -> None:
    assert not advice(ValueError("no"))
    assert not advice(RuntimeError("shapes differ"))
    assert not advice(ImportError("no module named x"))


def test_fail_ends_where_exceptions_are_caught(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(exit_status.WISH, raising=False)
    with pytest.raises(SystemExit) as ended:
        exit_status.fail(OSError(errno.ENOSPC, "No space left on device", "/x"))
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("error: /x: cannot be written (No space left")
    with pytest.raises(SystemExit):
        exit_status.fail(ValueError("a bug"))
    assert "ValueError: a bug" in capsys.readouterr().err
