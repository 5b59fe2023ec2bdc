"""Exit statuses, and failures in one message that people can read."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dhbe.core.errors import DHBEError, is_config_mistake, out_of_memory

FULL_ERROR = "HYDRA_FULL_ERROR"
LAUNCHERS = ("joblib", "submitit", "ray")
"""Packages whose exceptions tell of a worker that was killed."""
WISH = "DHBE_FULL_ERROR"
"""What the user set ``FULL_ERROR`` to, for processes that a run starts."""


def guarded(main: Callable[[], Any], *, worker_lost: Callable[[], Any] = lambda: None) -> None:
    """Call ``main``; end with one clear message and an exit status instead of a traceback.

    0: the result folder is complete. 2: the config is wrong. 1: anything else. 130 and 143:
    stopped by SIGINT or SIGTERM; the same command goes on from the last finished epoch.
    ``HYDRA_FULL_ERROR=1`` shows the traceback.

    Args:
        worker_lost: called when a launcher lost a worker, before the message.
    """
    wish = os.environ.setdefault(WISH, os.environ.get(FULL_ERROR, "0"))
    wants_traceback = wish == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra hands exceptions on instead of printing them itself
    signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
    except (DHBEError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        wrapped = isinstance(error, HydraException) and isinstance(error.__cause__, DHBEError)
        cause = error.__cause__ if wrapped else error
        _complain(str(cause))
        sys.exit(2 if is_config_mistake(error) else 1)
    except Exception as error:
        if _is_launchers(error):  # then Hydra does not come to the end of the sweep
            worker_lost()
        if wants_traceback or not (advice := _advice(error)):
            raise
        _complain(advice)
        sys.exit(1)


STOPPED = "stopped; what was finished is kept, and the same command continues from there"


def _terminated(number: int, frame: FrameType | None) -> None:
    print(STOPPED, file=sys.stderr)
    sys.exit(128 + number)


def _is_launchers(error: Exception) -> bool:
    return type(error).__module__.split(".")[0] in LAUNCHERS


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    print(f"({FULL_ERROR}=1 shows the traceback)", file=sys.stderr)


def _advice(error: Exception) -> str:
    """What to do about a failure of the machine; empty for errors of the program."""
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    if out_of_memory(error):
        return f"out of memory ({said}); lower defense.batch_size or victim.batch_size"
    if isinstance(error, OSError):  # Hydra makes the output folder before the pipeline starts
        return f"{said}; free space, or choose a writable hydra.run.dir"
    if _is_launchers(error):
        remedy = "the same command goes on with the cells that are not finished"
        return f"a worker was lost: {said}; {remedy}"
    if "PytorchStreamWriter" in said or type(error).__name__ == "SafetensorError":
        return f"a file could not be written ({said}); is the disk full?"
    return ""
