"""Commands as users type them, each in a process of its own.

The processes are forked from a server that has imported torch and Lightning once: a command that
starts an interpreter anew spends seven seconds on that alone.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["dhbe.cli", "dhbe.experiment.pipeline", "dhbe.report.__main__", "hydra._internal.hydra"]
)


class Command:
    """A running command, with the methods of ``subprocess.Popen`` that tests need.

    Args:
        words: what follows ``python``: a script and its arguments, or ``-m``, a module and its
            arguments.
        env: the whole environment.
        before: called in the new process, before the command; a function of a module.
    """

    def __init__(
        self,
        words: list[str],
        *,
        cwd: Path | str,
        env: Mapping[str, str] = os.environ,
        before: Callable[[], object] = int,
    ) -> None:
        self.args = words
        self.folder = Path(tempfile.mkdtemp())
        names = [str(self.folder / name) for name in ("stdout", "stderr")]
        self.process = SERVER.Process(
            target=_carry_out, args=(words, str(cwd), dict(env), names, before)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        if self.folder.exists():
            files = (self.folder / "stdout", self.folder / "stderr")
            self.said = tuple(f.read_text() if f.exists() else "" for f in files)
            shutil.rmtree(self.folder)
        return self.said[0], self.said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def called(
    words: list[str], *, cwd: Path | str, env: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """A command seen to its end."""
    command = Command(words, cwd=cwd, env=env)
    stdout, stderr = command.communicate()
    return subprocess.CompletedProcess(words, command.wait(), stdout, stderr)


def _carry_out(
    words: list[str], cwd: str, env: dict[str, str], files: list[str], before: Callable[[], object]
) -> None:
    """In the new process: what the interpreter does with these words."""
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    before()
    warnings.simplefilter("ignore")
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path[0] = str(Path(words[0]).parent)
            runpy.run_path(words[0], run_name="__main__")
    finally:
        threading._shutdown()  # lets joblib's workers go, which the next line would wait for
        atexit._run_exitfuncs()  # which a process of multiprocessing leaves out
