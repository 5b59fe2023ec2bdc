"""A folder is one worker's, on this machine and where the kernel's lock does not reach."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dhbe.core.locks import exclusive, held
from tests.conftest import tiered

WORKER = """
import sys, time, fcntl
from pathlib import Path
if sys.argv[2] == "nolock":
    fcntl.flock = lambda *_: None  # as on a network file system that keeps locks to each machine
from dhbe.core.locks import exclusive
path = Path(sys.argv[1])
with exclusive(path):
    inside = path.with_name("inside")
    inside.mkdir()  # fails if another one is in there
    print("in", flush=True)
    time.sleep(float(sys.argv[3]))
    inside.rmdir()
"""


def worker(path: Path, kernel: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(path), kernel, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("kernel", tiered(["nolock", "flock"], "nolock".__eq__))
def test_workers_take_turns(tmp_path: Path, kernel: str) -> None:
    workers = [worker(tmp_path / "abc", kernel, 0.3) for _ in range(4)]
    told = [w.communicate()[1] for w in workers]
    assert [w.returncode for w in workers] == [0] * 4, told
    assert not held(tmp_path / "abc")


@pytest.mark.parametrize("kernel", ["flock", "nolock"])
def test_a_killed_worker_holds_nothing(tmp_path: Path, kernel: str) -> None:
    path = tmp_path / "abc"
    killed = worker(path, kernel, 60)
    assert killed.stdout is not None
    assert killed.stdout.readline() == "in\n"
    assert held(path)
    killed.kill()
    killed.communicate()
    assert not held(path)
    (tmp_path / "inside").rmdir()
    start = time.monotonic()
    with exclusive(path):
        assert held(path)
    assert time.monotonic() - start < 5


@pytest.mark.long
def test_the_claim_of_another_machine_counts_until_it_is_renewed_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "abc"
    with exclusive(path, lease=3.0):
        claim = (tmp_path / ".abc.claim").read_text()
    monkeypatch.setattr("dhbe.core.locks.PATIENCE", 0.1)
    (tmp_path / ".abc.claim").write_text(claim.replace(os.uname().nodename, "another"))
    start = time.monotonic()
    with exclusive(path, lease=3.0):
        assert 2.5 < time.monotonic() - start < 20
    assert "abc: held by another process" in caplog.text
