"""Plant a backdoor, erase it, measure both: ``python run.py [group=choice] [key=value] ...``."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dhbe.entry import guarded, register_resolvers

register_resolvers()


@hydra.main(
    version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config"
)
def compose(cfg: DictConfig) -> None:
    """Run one composed config."""
    from dhbe.pipeline import run  # after Hydra has answered --help and refused unknown options

    hydra_config = HydraConfig.get()
    run(cfg, Path(hydra_config.runtime.output_dir), hydra_config.runtime.choices)


def main() -> None:
    """Console entry point: exit status 2 for a config mistake, 1 for other failures."""
    guarded(compose)


if __name__ == "__main__":
    main()
