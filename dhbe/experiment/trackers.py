"""Fail-safe trackers: requirements are checked first, later failures only warn."""

from __future__ import annotations

import http.client
import logging
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger

from dhbe.core.advice import advice
from dhbe.core.errors import ConfigError, DHBEError

SECONDS = 10
"""That a tracker may take to begin, or to end."""
LIMITS = {
    "init_timeout": SECONDS,
    "login_timeout": SECONDS,
    "finish_timeout": 3 * SECONDS,
    "finish_timeout_raises": True,
    "x_graphql_timeout_seconds": SECONDS,
    "x_graphql_retry_max": 1,
}
"""Settings of wandb, which waits for minutes, or without end, by itself."""
OFFLINE = "set logger.offline=true (`wandb sync` sends the runs later)"
log = logging.getLogger(__name__)


class Untroubled(Logger):
    """A logger whose failures warn once and never end a run.

    Attributes:
        inner: the logger itself.
    """

    def __init__(self, inner: Logger, name: str) -> None:
        super().__init__()
        self.inner, self._name, self.broken = inner, name, False

    @property
    def name(self) -> str | None:
        """Of the logger."""
        return self.inner.name

    @property
    def version(self) -> int | str | None:
        """Of the entry."""
        return self.inner.version

    def attempt(self, act: Callable[[], object], *, quietly: bool = False) -> None:
        """Do something with the logger; after a failure nothing more is done.

        Args:
            quietly: say nothing of a failure, because one was told already.
        """
        if self.broken:
            return
        try:
            act()
        except Exception as error:
            self.broken = True
            if quietly:
                return
            said = advice(error) or f"{type(error).__name__}: {error}".splitlines()[0]
            log.warning("logger=%s: %s; the run goes on without it", self._name, said)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Rates and losses at a step."""
        self.attempt(lambda: self.inner.log_metrics(*args, **kwargs))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config."""
        self.attempt(lambda: self.inner.log_hyperparams(*args, **kwargs))

    def save(self) -> None:
        """Write what is new."""
        self.attempt(self.inner.save)

    def close(self, status: str) -> None:
        """Finish the entry, if it was begun."""
        self.attempt(lambda: self.inner.finalize(status))
        if isinstance(self.inner, WandbLogger) and (entry := self.inner._experiment) is not None:
            told, self.broken = self.broken, False  # or the next run would go on with this entry
            self.attempt(lambda: _finish(entry, int(status != "success")), quietly=told)
            if self.broken:
                _leave_wandb()


def _finish(entry: Any, status: int) -> None:
    """End an entry of wandb; its own limit does not hold while files wait to be sent.

    Raises:
        Exception: it could not send everything in time, or for another reason.
    """
    failures: list[Exception] = []

    def finish() -> None:
        try:
            entry.finish(exit_code=status)
        except Exception as error:
            failures.append(error)

    waiting = Thread(target=finish, daemon=True)
    waiting.start()
    waiting.join(LIMITS["finish_timeout"] + SECONDS)
    if waiting.is_alive():
        raise DHBEError("not everything was sent in time; `wandb sync` sends it later")
    if failures:
        raise failures[0]


def _leave_wandb() -> None:
    """End wandb's own process, dead or busy with sending: the next run begins another one."""
    import wandb

    with suppress(Exception):
        service = wandb.setup().ensure_service()._proc
        if service is not None:
            service._process.kill()
            service._process.wait(SECONDS)  # or it stays a zombie, and Python warns of it later
    with suppress(Exception, SystemExit):  # it hands on how its process ended
        wandb.teardown()
    wandb.run = None  # which Lightning would take for an entry in progress


def wandb_settings() -> dict[str, Any]:
    """``LIMITS``, as far as the installed wandb knows them."""
    import wandb

    known = getattr(wandb.Settings, "model_fields", {})
    return {k: v for k, v in LIMITS.items() if k in known}


def begin_wandb(logger: WandbLogger, *, offline: bool) -> None:
    """Create the wandb run now, not during training.

    Raises:
        ConfigError: there is no key.
        DHBEError: the server does not answer, or it cannot begin for another reason.
    """
    import wandb

    if not offline and os.environ.get("WANDB_MODE", "online") in ("online", "run", "shared"):
        reach(wandb.setup().settings.base_url)
    try:
        _ = logger.experiment
    except Exception as error:
        said = advice(error) or str(error).splitlines()[0]
        if "API key" in said or "log in" in said:
            raise ConfigError(f"logger=wandb: no key: call `wandb login`, or {OFFLINE}") from error
        raise DHBEError(f"logger=wandb: {said}; {OFFLINE}") from error


def reach(url: str) -> None:
    """Check that a server answers.

    Raises:
        DHBEError: it does not answer within seconds.
    """
    try:
        urllib.request.urlopen(url, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return  # an answer
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLError):
            return  # an answer too; wandb has certificates of its own
        raise DHBEError(f"logger=wandb: {url} does not answer ({cause}); {OFFLINE}") from error
