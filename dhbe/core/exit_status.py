"""Exit statuses, and failures in one message that people can read."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from dhbe.core.advice import advice, lost_worker
from dhbe.core.errors import DHBEError, is_config_mistake

FULL_ERROR = "HYDRA_FULL_ERROR"
UNWRITABLE = "backslashreplace"
"""What becomes of characters that a file or a terminal cannot show, as in names of Latin-1."""
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
    os.environ.setdefault(WISH, os.environ.get(FULL_ERROR, "0"))
    os.environ[FULL_ERROR] = "1"  # Hydra hands exceptions on instead of printing them itself
    signal.signal(signal.SIGTERM, _terminated)
    lenient()
    try:
        main()
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if lost_worker(error):  # then Hydra does not come to the end of the sweep
            worker_lost()
        if (told := explained(error)) is None:
            raise
        message, status = told
        _complain(message)
        sys.exit(status)


def lenient() -> None:
    """Let no character end a command that is to be printed."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=UNWRITABLE)


def explained(error: Exception) -> tuple[str, int] | None:
    """Message and exit status; None where the traceback is wanted, by the user or for a bug."""
    if os.environ.get(WISH) == "1":
        return None
    if isinstance(error, (DHBEError, HydraException, OmegaConfBaseException)):
        wrapped = isinstance(error, HydraException) and isinstance(error.__cause__, DHBEError)
        cause = error.__cause__ if wrapped else error
        return str(cause), 2 if is_config_mistake(error) else 1
    found = advice(error)
    return (found, 1) if found else None


def fail(error: Exception) -> NoReturn:
    """End the process as ``guarded`` would, where code in between catches exceptions."""
    if (told := explained(error)) is None:
        traceback.print_exception(error)
        sys.exit(1)
    _complain(told[0])
    sys.exit(told[1])


STOPPED = "stopped; what was finished is kept, and the same command continues from there"


def _terminated(number: int, frame: FrameType | None) -> None:
    print(STOPPED, file=sys.stderr)
    sys.exit(128 + number)


def _complain(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    print(f"({FULL_ERROR}=1 shows the traceback)", file=sys.stderr)
