"""A run whose disk, clock or process fails at a chosen change of a file: at every one, if asked.

``python -m benchmarks.faults kill`` runs one tiny cell and counts its changes of files and folders;
then, for each of them, it runs the cell in an empty folder with SIGKILL in place of that change (a
write is half done), looks for anything that seems finished and is not, runs the same command again,
and compares every number with the undisturbed run's. Other subjects:

    full      from that change on, whatever makes or writes a file fails with ENOSPC
    clock     from that change on, the clock is a day late, or early
    joblib    as ``kill``, a sweep with two workers; one of them is killed, or all at once
    sweep     a sweep of many attacks, killed ``--kills`` times, a random number of changes on
    disk      tmpfs of 12 sizes; inodes: of 12 numbers of inodes (both mount, so: root)
    hosts     two sweeps on one folder, each in network, PID and host name namespaces of its own,
              where the kernel's locks do not reach the other (``unshare``, root)

Needs Linux and a C compiler. The processes are forked from this one, which has imported torch.
Exit status 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import atexit
import ctypes
import mmap
import os
import random
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.clusters import ROOT, numbers
from benchmarks.kill_test import leftovers
from dhbe.core.provenance import commit

NONE, KILL, GROUP, FULL, CLOCK = range(5)
DAY = 86_400
NAMESPACES = 0x40000000 | 0x04000000 | 0x20000000
"""CLONE_NEWNET, CLONE_NEWUTS, CLONE_NEWPID."""
CELL = [
    *("data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=2"),
    *("trainer.threads=1", "trainer.observe_every=1", "defense.epochs=2", "defense.iterations=2"),
    *("defense.warm_up=1", "defense.batch_size=8", "defense.width=4", "defense.patch_width=4"),
]
"""DHBE on BadNets, as small as can be."""
ZOO = [
    "attack=badnets,blend,sig,trojan_sq,l0_inv,lsb,ftrojan,wanet,bpp,lira,input_aware,composite",
    *("data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=2"),
    *("trainer.threads=1", "trainer.observe_every=1", "defense=clp"),
]
REUSED = 11
"""Changes that a sweep makes for each cell that is finished: its lock, its claim, its note."""
SIZES = {
    "size={}k": [50, 100, 200, 400, 600, 800, 1000, 1200, 1500, 2000, 3000, 4000],
    "nr_inodes={}": [2, 4, 6, 8, 10, 12, 16, 20, 25, 30, 40, 50],
}
"""Options of tmpfs; the last ones are room enough."""


class State(ctypes.Structure):
    """What ``faults.c`` shares with its processes."""

    _fields_ = [(n, ctypes.c_long) for n in ("count", "at", "what", "seconds", "reached")]


class Trial:
    """One folder, and the commands that work in it.

    Args:
        folder: of victims and results; must be there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.beside = folder, Path(tempfile.mkdtemp())
        self.file = self.beside / "state"
        self.file.write_bytes(bytes(State()))
        with self.file.open("r+b") as file:
            self.state = State.from_buffer(mmap.mmap(file.fileno(), 0))

    def call(self, words: list[str], *, at: int = 0, what: int = NONE, seconds: int = 0) -> int:
        """Carry out ``run.py`` with a fault; exit status, or minus the number of a signal."""
        s = self.state
        s.count, s.at, s.what, s.seconds, s.reached = 0, at, what, seconds, 0
        process = self.start(words)
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status)

    def start(self, words: list[str], *, said: str = "said", **more: str) -> int:
        """The number of the new process, whose output goes into the file ``said`` beside."""
        if process := os.fork():
            return process
        os.setsid()
        os.environ |= {"FAULTS_STATE": str(self.file), "FAULTS_UNDER": str(self.folder)} | more
        output = os.open(self.beside / said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        for number in (1, 2):
            os.dup2(output, number)
        os.chdir(self.folder)
        results = f"paths.results={self.folder}/results"
        sys.argv = ["run.py", *words, f"paths.victims={self.folder}/victims", results]
        status = 1
        try:
            runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            vars(threading)["_shutdown"]()  # as an interpreter ends, or joblib's workers are
            atexit._run_exitfuncs()  # waited for until they are tired of waiting
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        raise AssertionError

    @property
    def said(self) -> str:
        """Output of the last command."""
        return (self.beside / "said").read_text(errors="replace")

    def close(self) -> None:
        """Remove both folders."""
        shutil.rmtree(self.beside)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def trial() -> Iterator[Trial]:
    """In an empty folder."""
    found = Trial(Path(tempfile.mkdtemp()))
    try:
        yield found
    finally:
        found.close()


def unfinished(folder: Path) -> list[str]:
    """What seems finished after a fault, and is not."""
    wrong = []
    for cell in (folder / "results").glob("[0-9a-f]*"):
        if any(cell.iterdir()):
            wrong += [w for w in leftovers(folder) if w.startswith(str(cell))]
    for victim in (folder / "victims").glob("[!.]*"):
        if {f.name for f in victim.iterdir()} != {"victim.json", "victim.safetensors"}:
            wrong.append(f"{victim}: half a victim")
    return wrong


def again(t: Trial, words: list[str], expected: dict[str, Any]) -> list[str]:
    """Call the same command once more; what is not as in the undisturbed run."""
    if status := t.call(words):
        return [f"the next run ended with {status}: {t.said[-300:]}"]
    found = numbers(t.folder)
    wrong = [f"{c}: numbers differ" for c in expected if found.get(c) != expected[c]]
    wrong += [f"{c}: not a cell" for c in found.keys() - expected.keys()]
    return wrong + leftovers(t.folder)


def explained(t: Trial, status: int) -> list[str]:
    """What is wrong with how a failed run ended: no status 1, no line, a traceback."""
    wrong = [] if status == 1 else [f"status {status}"]
    if not re.search(r"^error: .", t.said, re.M):
        wrong.append(f"no line of an error: {t.said[-300:]}")
    return wrong + (["a traceback"] if "Traceback" in t.said else [])


def calm(words: list[str]) -> tuple[dict[str, Any], int]:
    """Numbers of the undisturbed run, and its changes of files."""
    with trial() as t:
        if status := t.call(words):
            sys.exit(f"the undisturbed run ended with {status}: {t.said}")
        return numbers(t.folder), t.state.count


def at_every(words: list[str], options: argparse.Namespace, what: int, seconds: int = 0) -> int:
    """The fault at every ``options.every``-th change; the number of points that went wrong."""
    expected, count = calm(words)
    points = range(options.start, count + 1, options.every)
    bad = missed = 0
    for at in points:
        with trial() as t:
            status = t.call(words, at=at, what=what, seconds=seconds)
            missed += not t.state.reached
            wrong = unfinished(t.folder)
            if what == FULL and status:
                wrong += explained(t, status)
            if what == CLOCK and status:
                wrong.append(f"ended with {status}: {t.said[-300:]}")
            wrong += again(t, words, expected)
        bad += bool(wrong)
        if wrong:
            print(f"change {at}: {'; '.join(wrong)}", flush=True)
    print(f"{count} changes, {len(points)} tried, {missed} not reached, {bad} went wrong")
    return bad


def kill(options: argparse.Namespace) -> int:
    """SIGKILL at every change."""
    return at_every(CELL, options, KILL)


def full(options: argparse.Namespace) -> int:
    """ENOSPC from every change on."""
    return at_every(CELL, options, FULL)


def clock(options: argparse.Namespace) -> int:
    """A day forwards, a day backwards."""
    return sum(at_every(CELL, options, CLOCK, seconds) for seconds in (DAY, -DAY))


def joblib(options: argparse.Namespace) -> int:
    """One of two workers killed; all killed."""
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "seed=0,1", *CELL]
    return sum(at_every(words, options, what) for what in (KILL, GROUP))


def sweep(options: argparse.Namespace) -> int:
    """Many kills in one sweep; in the end its numbers and its tables."""
    words = ["-m", *ZOO]
    with trial() as quiet, trial() as t:
        if status := quiet.call(words):
            sys.exit(f"the undisturbed sweep ended with {status}: {quiet.said}")
        count, expected = quiet.state.count, numbers(quiet.folder)
        rng = random.Random(options.seed)
        wrong, kills = [], 0
        while kills < options.kills:
            seen = REUSED * len(numbers(t.folder))
            at = rng.randint(1, seen + 3 * count // options.kills)
            done = t.call(words, at=at, what=KILL)
            wrong += unfinished(t.folder)
            if done != -signal.SIGKILL:
                break
            kills += 1
        wrong += again(t, words, expected)
        tables = [table(x.folder) for x in (quiet, t)]
        wrong += ["tables differ"] * (tables[0] != tables[1])
    print(
        f"{count} changes undisturbed, {len(expected)} cells, {kills} kills: {wrong or 'all well'}"
    )
    return len(wrong)


def table(folder: Path) -> list[str]:
    """The report's tables without their last column, where it tells seconds."""
    command = [sys.executable, "-m", "dhbe.report", str(folder / "results"), "--out"]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FAULTS", "LD_PRELOAD"))}
    subprocess.run([*command, str(folder / "report")], cwd=ROOT, env=env, check=True)
    rates, timed = (folder / "report" / "tables.md").read_text().split("## Means over seeds")
    return [rates, *(line.rpartition("|")[0].rpartition("|")[0] for line in timed.splitlines())]


def small(option: str) -> Callable[[argparse.Namespace], int]:
    """Twelve small file systems, one after the other; then room enough."""

    def tried(options: argparse.Namespace) -> int:
        expected, _ = calm(CELL)
        bad = 0
        for limit in map(option.format, SIZES[option]):
            with trial() as t:
                mount(t.folder, limit)
                status = t.call(CELL)
                ended = f"ended with {status}: {''.join(re.findall('^error: .*', t.said, re.M))}"
                wrong = unfinished(t.folder) + (explained(t, status) if status else [])
                mount(t.folder, "remount,size=64m,nr_inodes=10k")
                wrong += again(t, CELL, expected)
                subprocess.run(["umount", t.folder], check=True)
            print(f"{limit}: {ended}; {'; '.join(wrong) or 'all well'}", flush=True)
            bad += bool(wrong)
        return bad

    return tried


def mount(folder: Path, options: str) -> None:
    """A file system in memory."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "dhbe-faults", folder], check=True)


def hosts(options: argparse.Namespace) -> int:
    """Two machines, one folder, no lock of the kernel between them."""
    words = ["-m", "seed=0,1,2", *CELL]
    expected, _ = calm(words)
    with trial() as t:
        processes = []
        for name in ("first", "second"):
            if not (parent := os.fork()):
                os._exit(as_host(name, partial(t.start, words, said=name, FAULTS_NOLOCK="1")))
            processes.append(parent)
        ended = [os.waitstatus_to_exitcode(os.waitpid(p, 0)[1]) for p in processes]
        said = [(t.beside / name).read_text() for name in ("first", "second")]
        shares = [text.count("report.html inside") for text in said]
        wrong = [f"{e}: {text[-500:]}" for e, text in zip(ended, said, strict=True) if e]
        wrong += [f"computed {shares} cells"] * (sum(shares) != len(expected))
        wrong += again(t, words, expected)
    print(f"two hosts computed {shares} of {len(expected)} cells: {wrong or 'all well'}")
    return len(wrong)


def as_host(name: str, start: Callable[[], int]) -> int:
    """Start something where names, networks and process numbers are another machine's.

    The first process there is number 1, on each such machine. Returns how it ended.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NAMESPACES) or libc.sethostname(name.encode(), len(name)):
        print(f"unshare: {os.strerror(ctypes.get_errno())}", flush=True)
        return 1
    return abs(os.waitstatus_to_exitcode(os.waitpid(start(), 0)[1]))


SUBJECTS: dict[str, Callable[[argparse.Namespace], int]] = {
    **{f.__name__: f for f in (kill, full, clock, joblib, sweep, hosts)},
    **{kind: small(option) for kind, option in zip(("disk", "inodes"), SIZES, strict=True)},
}


def preloaded() -> None:
    """Begin anew with ``faults.c`` before all libraries."""
    library = Path(tempfile.mkdtemp()) / "faults.so"
    source = Path(__file__).with_suffix(".c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    env = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.faults", *sys.argv[1:]], env)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("--every", type=int, default=1, help="try each so-and-so-many-th change")
    parser.add_argument("--start", type=int, default=1, help="from this one on")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the kills in a sweep")
    options = parser.parse_args()
    if "faults.so" not in os.environ.get("LD_PRELOAD", ""):
        preloaded()
    import dhbe.cli
    import dhbe.experiment.pipeline

    del dhbe
    begun = time.perf_counter()
    bad = SUBJECTS[options.subject](options)
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(u.ru_utime + u.ru_stime for u in used)
    print(f"commit {commit()}; {time.perf_counter() - begun:.0f} s, {cpu:.0f} CPU seconds")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
