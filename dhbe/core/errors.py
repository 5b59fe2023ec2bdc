"""Errors that a user can fix; everything else is a bug and keeps its traceback."""

from __future__ import annotations

import errno

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException


class DHBEError(Exception):
    """The run cannot go on; the message says what was got, expected, and what to do (exit 1)."""


class ConfigError(DHBEError, ValueError):
    """The configuration asks for something unknown, ill-typed or impossible (exit 2)."""


class BudgetError(ConfigError):
    """A defense asked for more data than its budget grants."""


class DataError(DHBEError):
    """A data set is missing, incomplete or corrupt."""


class ArtefactError(DHBEError):
    """A stored victim or checkpoint is truncated, edited or of another format."""


class DivergenceError(DHBEError):
    """A training produced NaN or infinite values."""


class LostError(DHBEError):
    """A process was killed, by the kernel (out of memory) or by a user."""


def got(key: str, value: object, allowed: str, remedy: str = "") -> ConfigError:
    """ConfigError in the project's one form: key, value, what is allowed, what to do."""
    tail = f"; {remedy}" if remedy else ""
    return ConfigError(f"{key}={value}: expected {allowed}{tail}")


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine has no memory left; torch says so in several ways."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or "OutOfMemory" in type(error).__name__
        or (
            isinstance(error, RuntimeError)
            and any(s in str(error) for s in ("allocate memory", "std::bad_alloc"))
        )
    )


def is_config_mistake(error: BaseException) -> bool:
    """Whether the config is to blame (exit status 2), by the error or what caused it."""
    if isinstance(error, (ConfigError, OmegaConfBaseException)):
        return True
    cause = error.__cause__
    return isinstance(error, HydraException) and (
        isinstance(cause, ConfigError) or not isinstance(cause, DHBEError)
    )
