"""The command line: ``dhbe [group=choice] [key=value] ...`` and ``dhbe-purify FILE``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dhbe import __version__
from dhbe.config.resolvers import register_resolvers
from dhbe.config.schema import plain, refuse_early
from dhbe.core.errors import ConfigError
from dhbe.core.exit_status import guarded
from dhbe.core.paths import CONF

register_resolvers()


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def compose(cfg: DictConfig) -> None:
    """Run one composed config."""
    refuse_early(plain(cfg))
    from dhbe.experiment.pipeline import run  # imports torch, which takes seconds

    hydra_config = HydraConfig.get()
    run(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices)


def main() -> None:
    """Console entry point ``dhbe``: exit status 2 for a config mistake, 1 for other failures."""
    if sys.argv[1:] == ["--version"]:
        print(f"dhbe {__version__}")
        return
    guarded(compose, worker_lost=_list_failures)


def purify() -> None:
    """Console entry point ``dhbe-purify FILE [key=value ...]``: ``task=purify checkpoint=FILE``."""

    def purified() -> None:
        sys.argv[1:] = purify_arguments(sys.argv[1:])
        compose()

    guarded(purified)


def _list_failures() -> None:
    from dhbe.sweeping.plan import launched, summarize

    for plan in launched:
        summarize(plan)


def purify_arguments(given: list[str]) -> list[str]:
    """``FILE key=value ...`` of ``dhbe-purify`` -> arguments of ``dhbe``; options stay as they are.

    Raises:
        ConfigError: no file is named.
    """
    if given and given[0].startswith("-"):
        return ["task=purify", *given]
    if not given or ("=" in given[0] and not os.path.exists(given[0])):
        raise ConfigError(
            "dhbe-purify: name the checkpoint first: dhbe-purify FILE [key=value ...]"
        )
    quoted = given[0].replace("\\", "\\\\").replace("'", "\\'")
    return ["task=purify", f"checkpoint='{quoted}'", *given[1:]]
