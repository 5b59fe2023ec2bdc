"""Commands as users type them, each in a process of its own.

An interpreter that starts anew spends seven seconds on importing torch and Lightning. So they are
forked from a server, which is itself a fork of pytest's process as it was before the first test.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import math
import multiprocessing
import os
import pickle
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

IMPORTED = ("dhbe.cli", "dhbe.experiment.pipeline", "dhbe.report.__main__", "hydra._internal.hydra")
PAUSE = 0.02
"""Seconds between two looks at a command that is waited for."""


class Server:
    """Starts commands and sees how they end; it goes when this process does."""

    def __init__(self) -> None:
        self.pipe: Connection | None = None
        self.lock = threading.Lock()

    def begin(self) -> None:
        """Fork the server; else the first command does."""
        for name in IMPORTED:
            importlib.import_module(name)
        ours, theirs = multiprocessing.Pipe()
        if not os.fork():
            ours.close()
            _serve(theirs)
        theirs.close()
        self.pipe = ours

    def start(self, *given: object) -> int:
        """Process number of ``_carry_out`` with these arguments."""
        return self._asked(pickle.dumps(given))

    def ended(self, pid: int) -> int | None:
        """Exit status, negative for a signal; None while the process runs."""
        return self._asked(pid)

    def _asked(self, question: bytes | int) -> int:
        with self.lock:
            if self.pipe is None:
                self.begin()
            self.pipe.send(question)
            return self.pipe.recv()


def _serve(pipe: Connection) -> NoReturn:
    ended: dict[int, int] = {}
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            os._exit(0)
        if isinstance(asked, int):
            found, status = (0, 0) if asked in ended else os.waitpid(asked, os.WNOHANG)
            if found:
                ended[asked] = os.waitstatus_to_exitcode(status)
            pipe.send(ended.get(asked))
        elif pid := os.fork():
            pipe.send(pid)
        else:
            pipe.close()
            _carry_out(*pickle.loads(asked))


SERVER = Server()


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
        self.pid = SERVER.start(words, str(cwd), dict(env), names, before)

    @property
    def returncode(self) -> int | None:
        return SERVER.ended(self.pid)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float = math.inf) -> int:
        end = time.monotonic() + timeout
        while (status := self.returncode) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(PAUSE)
        return status

    def communicate(self, timeout: float = math.inf) -> tuple[str, str]:
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
) -> NoReturn:
    """In the new process: what the interpreter does with these words."""
    for number, name in enumerate(files, start=1):
        os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 1
    try:
        _as_new()
        status = _interpreted(words, cwd, env, before)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _as_new() -> None:
    """Undo what pytest has done to the process, and leave its temporary folders to it."""
    atexit._clear()
    logging.root.handlers.clear()
    sys.stdin, sys.stdout, sys.stderr = (
        open(number, mode, buffering=1, closefd=False)  # noqa: SIM115
        for number, mode in enumerate("rww")
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    sys.unraisablehook = sys.__unraisablehook__


def _interpreted(
    words: list[str], cwd: str, env: dict[str, str], before: Callable[[], object]
) -> int:
    """Exit status of a module or script."""
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
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    finally:
        threading._shutdown()  # first, as an interpreter does: joblib ends its workers here
        atexit._run_exitfuncs()
    return 0
