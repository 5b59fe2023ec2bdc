"""The same sweep under several launchers, Slurm and Ray among them, for real on one machine.

``python -m benchmarks.clusters basic joblib submitit_local slurm ray [--cells OVERRIDE...]`` starts
a one-node Slurm (Debian: ``apt-get install slurm-wlm munge``, as root) and a Ray of two nodes, runs
six cells and one that must fail, and compares every number of ``metrics.json`` with the first
launcher's. ``preempt`` sends a cell under Slurm the signal of a preemption in mid-training;
``timeout`` gives one less time than it needs. What is not installed is skipped, and said. Exit
status 1 if anything differs from what it should be.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dhbe.core.provenance import commit
from tests.support.launch import continued

ROOT = Path(__file__).parent.parent
CELLS = [
    *("victim.epochs=1", "trainer.threads=1", "defense=clp"),
    "victim.learning_rate=0.05,0.1,0.15,0.2,0.25,0.3,1e30",  # the last one diverges
]
FAILING = 1
OPTIONS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.callbacks.sweep.workers=2"],
    "slurm": [
        *("hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=null"),
        *("hydra.launcher.cpus_per_task=1", "hydra.launcher.array_parallelism=2"),
    ],
}
ENDED = {
    "preempt": ["defense=clp"],
    "timeout": [
        *("defense=none", "victim.epochs=40"),
        *("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30"),
    ],
}
"""A cell that Slurm ends before it is done, and options."""
SLURM_CONF = """
ClusterName=tiny
SlurmctldHost=localhost(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores} CoresPerSocket={cores} State=UNKNOWN
PartitionName=main Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


class Skipped(Exception):
    """Something is not installed here."""


@contextmanager
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    """A list for daemons in the foreground; they are ended, the last first, by their ids."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def until(command: list[str], env: dict[str, str], word: str, seconds: float = 60) -> None:
    """Wait until a command's output contains a word."""
    for _ in range(int(seconds)):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if word in done.stdout:
            return
        time.sleep(1)
    raise RuntimeError(f"{' '.join(command)}: no {word!r} after {seconds} s: {done.stderr}")


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """Environment of a one-node Slurm without systemd, cgroups and accounting."""
    missing = [p for p in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(p)]
    if missing or os.getuid() != 0:
        raise Skipped(
            f"needs root, and {missing or 'nothing else'}; apt-get install slurm-wlm munge"
        )
    if not importlib.util.find_spec("submitit"):
        raise Skipped('pip install -e ".[slurm]"')
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, processes() as started:
        for name in ("ctld", "spool"):
            (Path(folder) / name).mkdir()
        conf = Path(folder) / "slurm.conf"
        conf.write_text(SLURM_CONF.format(folder=folder, cores=os.cpu_count()))
        env = os.environ | {"SLURM_CONF": str(conf)}
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run(["munge", "-n"], check=False, **quiet).returncode:
            Path("/run/munge").mkdir(exist_ok=True)
            shutil.chown("/run/munge", "munge", "munge")
            munge = ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups"]
            started.append(subprocess.Popen([*munge, "/usr/sbin/munged", "--foreground"], **quiet))
            time.sleep(1)
        started.append(subprocess.Popen(["slurmctld", "-D"], env=env, **quiet))
        started.append(subprocess.Popen(["slurmd", "-D", "-N", "localhost"], env=env, **quiet))
        until(["sinfo", "-h", "-o", "%T"], env, "idle")
        yield env


@contextmanager
def ray() -> Iterator[dict[str, str]]:
    """Environment of a Ray of two nodes on this machine, one core each."""
    if not importlib.util.find_spec("ray"):
        raise Skipped('pip install -e ".[ray]" into an environment of its own')
    command = [sys.executable, "-c", "import sys; from ray.scripts.scripts import main; main()"]
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
    start = [*command, "start", "--block", "--num-cpus=1", "--disable-usage-stats"]
    with processes() as started, tempfile.TemporaryFile() as log:
        for place in (
            ["--head", "--port=6399", "--include-dashboard=false"],
            ["--address=127.0.0.1:6399"],
        ):
            started.append(
                subprocess.Popen([*start, *place], env=env, stdout=log, stderr=subprocess.STDOUT)
            )
            time.sleep(10)
        count = "import ray; ray.init('127.0.0.1:6399', log_to_driver=False); "
        count += "print('alive', sum(n['Alive'] for n in ray.nodes()))"
        until([sys.executable, "-c", count], env, "alive 2")
        yield env | {"RAY_ADDRESS": "127.0.0.1:6399"}


def sweep(folder: Path, launcher: str, env: dict[str, str], cells: list[str]) -> Any:
    """``python run.py -m``, started; victims and results in ``folder``."""
    command = [sys.executable, "run.py", "-m", f"hydra/launcher={launcher}"]
    command += [*OPTIONS.get(launcher, []), *cells]
    command += [f"paths.victims={folder}/victims", f"paths.results={folder}/results"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def numbers(folder: Path) -> dict[str, Any]:
    """The measured part of ``metrics.json`` by cell."""
    found = {}
    for file in (folder / "results").glob("[0-9a-f]*/metrics.json"):
        m = json.loads(file.read_text())
        found[file.parent.name] = {k: m[k] for k in ("victim", "purified", "counts", "der")}
    return found


@contextmanager
def environment(launcher: str) -> Iterator[dict[str, str]]:
    """What a launcher needs to be running, for as long as it is needed."""
    needs = {"joblib": "hydra_plugins.hydra_joblib_launcher", "submitit_local": "submitit"}
    if launcher in needs and not importlib.util.find_spec(needs[launcher]):
        raise Skipped("its extra is not installed")
    cluster = {"slurm": slurm, **dict.fromkeys(ENDED, slurm), "ray": ray}.get(launcher)
    if cluster is None:
        yield dict(os.environ)
        return
    with cluster() as env:
        yield env


def trial(launcher: str, folder: Path, cells: list[str]) -> tuple[dict[str, Any], bool]:
    """Numbers of the cells under a launcher, and whether failures were reported as they should."""
    with environment(launcher) as env:
        start = time.perf_counter()
        process = sweep(folder, launcher, env, cells)
        _, errors = process.communicate()
        seconds = time.perf_counter() - start
    found = numbers(folder)
    failing = FAILING if cells is CELLS else 0
    reported = [line for line in errors.splitlines() if line.startswith("failed: ")]
    good = len(reported) == failing and process.returncode == (1 if failing else 0)
    print(
        f"{launcher}: {len(found)} cells done, exit status {process.returncode}, {seconds:.0f} s; "
        + "; ".join(reported),
        flush=True,
    )
    if not good:
        print(errors[-3000:])
    return found, good


def ended(how: str, folder: Path) -> bool:
    """Whether a cell that is preempted or out of time is queued again and continues."""
    with environment(how) as env:
        process = sweep(folder, "slurm", env, ["trainer.threads=1", "seed=0", *ENDED[how]])
        if how == "preempt":
            checkpoint = "victims/.*.partial/last.ckpt"
            while not list(folder.glob(checkpoint)) and process.poll() is None:
                time.sleep(0.2)
            queue = ["squeue", "-h", "-o", "%A"]
            job = subprocess.run(queue, env=env, capture_output=True, text=True).stdout.split()[0]
            subprocess.run(["scancel", "--signal=USR2", "--full", job], env=env, check=True)
        _, errors = process.communicate()
    logs = "".join(f.read_text() for f in folder.rglob("*_log.*"))
    said = "this job is " + {"preempt": "preempted", "timeout": "timed-out"}[how]
    good = process.returncode == 0 and said in logs and len(numbers(folder)) == 1
    went_on = good and continued(folder)
    print(
        f"{how}: exit status {process.returncode}, queued again: {logs.count(said)} times, "
        f"went on from its checkpoint: {went_on}"
    )
    if not good:
        print(errors[-2000:], logs[-3000:])
    return went_on


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clusters", description=__doc__)
    known = ("basic", "joblib", "submitit_local", "slurm", "ray", *ENDED)
    parser.add_argument("launchers", nargs="+", choices=known)
    parser.add_argument("--cells", nargs="+", default=CELLS, help="overrides of another sweep")
    parser.add_argument("--reference", type=Path, help="numbers of an earlier call; made if new")
    options = parser.parse_args()
    print(f"commit {commit()}, {os.cpu_count()} cores")
    reference: Path | None = options.reference
    known_numbers = reference is not None and reference.exists()
    first: dict[str, Any] = json.loads(reference.read_text()) if reference and known_numbers else {}
    wrong = False
    for launcher in options.launchers:
        with tempfile.TemporaryDirectory(prefix=f"{launcher}-") as folder:
            try:
                if launcher in ENDED:
                    wrong |= not ended(launcher, Path(folder))
                    continue
                found, good = trial(launcher, Path(folder), options.cells)
            except Skipped as reason:
                print(f"{launcher}: SKIPPED, {reason}")
                continue
        if not first:
            first = found
            if reference is not None:
                reference.write_text(json.dumps(first))
        same = found == first
        print(f"{launcher}: numbers {'identical' if same else 'DIFFER'}", flush=True)
        wrong |= not (same and good)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
