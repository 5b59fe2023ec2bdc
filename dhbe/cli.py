"""The command line: ``dhbe [group=choice] [key=value] ...`` and ``dhbe-purify FILE``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dhbe import __version__
from dhbe.config.arguments import refuse_ignored
from dhbe.config.resolvers import register_resolvers
from dhbe.config.schema import plain, refuse_early
from dhbe.core.errors import ConfigError
from dhbe.core.exit_status import guarded
from dhbe.core.paths import CONF

register_resolvers()
NAMES = ("checkpoint", "victim.path")
"""Options that hold the path of a checkpoint."""


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

    def composed() -> None:
        refuse_ignored(sys.argv[1:])
        sys.argv[1:] = plain_names(sys.argv[1:])
        compose()

    guarded(composed, worker_lost=_list_failures)


def purify() -> None:
    """Console entry point ``dhbe-purify FILE [key=value ...]``: ``task=purify checkpoint=FILE``."""

    def purified() -> None:
        refuse_ignored(["task=purify", *sys.argv[2:]])
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
    return ["task=purify", f"checkpoint={literal(given[0])}", *plain_names(given[1:])]


def plain_names(given: list[str]) -> list[str]:
    """Arguments in which the name of a checkpoint is a name, whatever characters it has.

    Only a sweep over several (``--multirun checkpoint=a.pt,b.pt``) is left to Hydra.
    """
    several = {"-m", "--multirun"} & set(given)
    return [_plain_name(argument, bool(several)) for argument in given]


def _plain_name(argument: str, several: bool) -> str:
    key, equals, name = argument.partition("=")
    if key.lstrip("+") not in NAMES or not name:
        return argument
    if name[0] == name[-1] and name[0] in "'\"" and len(name) > 2 and not os.path.lexists(name):
        name = name[1:-1].replace("\\" + name[0], name[0])
    if several and not os.path.lexists(name):
        return argument
    return f"{key}{equals}{literal(name)}"


def literal(name: str) -> str:
    """A file's name as an argument of Hydra that stands for nothing but itself.

    Neither Hydra's grammar (``epoch=9-step=100.ckpt``, brackets, quotes, ``~``) nor interpolation
    (``${oc.env:SECRET}.pt``) sees it.
    """
    if name == "???":  # which means a missing value
        name = "./???"
    if name.startswith("~") and not os.path.lexists(name):
        name = os.path.expanduser(name)
    text = re.sub(r"(\\*)\$\{", lambda m: 2 * m[1] + r"\${", name)
    text = re.sub(r"(\\*)'", lambda m: 2 * m[1] + r"\'", text)
    text = re.sub(r"(\\+)$", lambda m: 2 * m[1], text)
    return f"'{text}'"
