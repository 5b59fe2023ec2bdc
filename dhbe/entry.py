"""What stands between the command line and the pipeline: resolvers, and errors people can read."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dhbe.errors import ConfigError, DHBEError

FULL_ERROR = "HYDRA_FULL_ERROR"
LAUNCHERS = ("joblib", "submitit", "ray")
"""Packages whose exceptions tell of a worker that was killed."""
WISH = "DHBE_FULL_ERROR"
"""What the user set ``FULL_ERROR`` to, for processes that a run starts."""


def register_resolvers() -> None:
    """``${cell:}``: hash of what determines the result; ``${package_data:MODULE}``: its folder;
    ``${workers:GIVEN}``: cells that this machine computes at once.
    """
    # Launchers of ours bear the names of the plugins' schemas, which they shall be checked against.
    warnings.filterwarnings("ignore", message=r"\s*'hydra/launcher/")
    OmegaConf.register_new_resolver("cell", _cell, replace=True)
    OmegaConf.register_new_resolver("workers", _workers, replace=True)
    OmegaConf.register_new_resolver("package_data", lambda module: str(files(module)), replace=True)


def _cell(*, _root_: DictConfig) -> str:
    from dhbe.config import cell, plain

    return cell(plain(_root_))


def _workers(given: int) -> int:
    from dhbe.sweep import workers

    return workers(given)


def is_config_mistake(error: BaseException) -> bool:
    """Whether the config is to blame (exit status 2), by the error or what caused it."""
    if isinstance(error, (ConfigError, OmegaConfBaseException)):
        return True
    cause = error.__cause__
    return isinstance(error, HydraException) and (
        isinstance(cause, ConfigError) or not isinstance(cause, DHBEError)
    )


def guarded(main: Callable[[], Any]) -> None:
    """Call ``main``; end with one clear message and an exit status instead of a traceback.

    0: the result folder is complete. 2: the config is wrong. 1: anything else. 130: interrupted.
    ``HYDRA_FULL_ERROR=1`` shows the traceback.
    """
    wish = os.environ.setdefault(WISH, os.environ.get(FULL_ERROR, "0"))
    wants_traceback = wish == "1"
    os.environ[FULL_ERROR] = "1"  # Hydra hands exceptions on instead of printing them itself
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (DHBEError, HydraException, OmegaConfBaseException) as error:
        if wants_traceback:
            raise
        cause = error.__cause__ if isinstance(error.__cause__, DHBEError) else error
        print(f"error: {cause}", file=sys.stderr)
        print(f"({FULL_ERROR}=1 shows the traceback)", file=sys.stderr)
        sys.exit(2 if is_config_mistake(error) else 1)
    except OSError as error:  # Hydra makes the output folder before the pipeline starts
        if wants_traceback:
            raise
        print(f"error: {error}; choose a writable hydra.run.dir", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if wants_traceback or type(error).__module__.split(".")[0] not in LAUNCHERS:
            raise
        remedy = "the same command goes on with the cells that are not finished"
        print(f"error: a worker was lost: {error}; {remedy}", file=sys.stderr)
        sys.exit(1)
