"""One-line advice for failures of the machine: what failed, where, and the remedy."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from dhbe.core.errors import out_of_memory

LAUNCHERS = ("joblib", "submitit", "ray")
"""Packages whose exceptions tell of a worker that was killed."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WRITTEN = (*FULL, errno.EROFS, errno.EEXIST, errno.ENOTEMPTY)
"""Of these only who writes hears."""
WRITERS = (
    *("mkdir", "makedirs", "replace", "rename", "unlink", "rmdir", "rmtree", "symlink_to", "touch"),
    *("write_text", "write_bytes", "copyfile", "move", "save", "savez_compressed", "flush"),
)
READERS = ("read_text", "read_bytes", "iterdir", "scandir", "listdir", "stat", "rglob", "glob")
MEMORY = "lower defense.batch_size or victim.batch_size"
MACHINE = {
    errno.EMFILE: "this process has too many open files; raise `ulimit -n`",
    errno.ENFILE: "this machine has too many open files; close other programs",
    errno.EIO: "the disk or the network share fails; check it, then call the same command again",
    errno.ESTALE: "the network share was lost; the same command continues once it is back",
    errno.EPIPE: "the reader of the output has ended; write it into a file",
}
THREADS = (
    "this machine or user may have no more threads or processes; lower trainer.threads, "
    "hydra.launcher.n_jobs or OMP_NUM_THREADS, or raise `ulimit -u`"
)


def advice(error: Exception) -> str:
    """One line for the user; empty for errors of the program."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if lost_worker(error):
        remedy = "the same command goes on with the cells that are not finished"
        return f"a worker was lost: {said}; {remedy}"
    if out_of_memory(error):
        return f"out of memory ({said}); {MEMORY}"
    if no_threads(error):
        return f"{said}: {THREADS}"
    if isinstance(error, ImportError) and "failed to map segment" in said:
        return f"out of memory ({said}); raise `ulimit -v`"
    if isinstance(error, OSError):
        return of_file(error)
    if "PytorchStreamWriter" in said or type(error).__name__ == "SafetensorError":
        return f"a file could not be written ({said}); is the disk full?"
    return ""


def lost_worker(error: Exception) -> bool:
    """Whether an exception means that a launcher's worker was killed."""
    return type(error).__module__.split(".")[0] in LAUNCHERS


def no_threads(error: Exception) -> bool:
    """Whether the machine refuses another thread or process."""
    if isinstance(error, OSError):
        return error.errno == errno.EAGAIN and error.filename is None
    said = str(error)
    return isinstance(error, RuntimeError) and (
        "can't start new thread" in said or "Resource temporarily unavailable" in said
    )


def of_file(error: OSError) -> str:
    """The path, whether it was read or written, the cause and the remedy."""
    cause = error.strerror or str(error) or type(error).__name__
    if error.errno in MACHINE:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{cause}: {MACHINE[error.errno]}"
    path = path_of(error)
    name = str(Path(path).absolute()) if path else ""
    wrote = written(error)
    done = {True: "written", False: "read", None: "read or written"}[wrote]
    if wrote is None and not path:
        return f"{type(error).__name__}: {cause}"
    remedy = "choose a writable hydra.run.dir, paths.results or paths.victims"
    if error.errno in FULL:
        remedy = "free space or inodes on its disk, or choose another place: paths.results, "
        remedy += "paths.victims"
    elif not wrote:
        remedy = "check that it is there and that you may read it"
    return f"{name or 'a file'}: cannot be {done} ({cause}); {remedy}"


def path_of(error: OSError) -> str:
    """The path that failed; of a copy that was not to be written, the one that it was to have."""
    names = [n for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
    return os.fsdecode(names[-1 if error.errno in WRITTEN else 0]) if names else ""


def written(error: OSError) -> bool | None:
    """Whether the failed call was a write; None if unknown.

    The kernel's answer does not say, so what the innermost calls are called and the mode in which
    they opened the file do, or else what is there: a file that is not would have been made.
    """
    if error.errno in WRITTEN:
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for frame in reversed(frames[-4:]):
        mode = frame.f_locals.get("mode")
        if isinstance(mode, str) and mode and set(mode) <= set("rwaxbt+"):
            return bool(set(mode) & set("wax+"))
        if frame.f_code.co_name in WRITERS:
            return True
        if frame.f_code.co_name in READERS:
            return False
    path = Path(path_of(error) or "?")
    if error.errno == errno.ENOENT and path.parent.is_dir():
        return False
    if error.errno == errno.EACCES and os.access(path, os.R_OK):
        return True
    return None
