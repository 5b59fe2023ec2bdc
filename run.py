"""Plant a backdoor, erase it, measure both: ``python run.py [group=choice] [key=value] ...``."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dhbe.cli import guarded, purify_arguments
from dhbe.config.resolvers import register_resolvers

register_resolvers()


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config"
)
def compose(cfg: DictConfig) -> None:
    """Run one composed config."""
    from dhbe.experiment.pipeline import run

    hydra_config = HydraConfig.get()
    run(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices)


def main() -> None:
    """Console entry point: exit status 2 for a config mistake, 1 for other failures."""
    guarded(compose)


def purify() -> None:
    """Console entry point ``dhbe-purify FILE [key=value ...]``: ``task=purify checkpoint=FILE``."""

    def purified() -> None:
        sys.argv[1:] = purify_arguments(sys.argv[1:])
        compose()

    guarded(purified)


if __name__ == "__main__":
    main()
