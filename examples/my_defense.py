"""A defense of your own in one file: ``python examples/my_defense.py defense=my_defense``.

All other overrides work as with ``run.py``. To keep the defense in the project, move the class to
``defenses/`` and its settings to ``conf/defense/`` (docs/adding_a_method.md).
"""

from typing import Annotated

import torch
from annotated_types import Gt
from hydra.core.config_store import ConfigStore

from dhbe.cli import main
from dhbe.contracts.defense import Defense
from dhbe.data import DefenderData
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class ClipFilters(Defense):
    """Shrink filters whose norm exceeds ``limit`` times the median of their layer; data-free."""

    def __init__(self, *, limit: Annotated[float, Gt(0)]) -> None:
        self.limit = limit

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        with torch.no_grad():
            for weight in (p for p in network.parameters() if p.ndim == 4):  # (out, in, h, w)
                norms = weight.flatten(1).norm(dim=1)  # (out,)
                factors = (self.limit * norms.median() / norms).clamp(max=1)
                weight.mul_(factors[:, None, None, None])
        return network


if __name__ == "__main__":
    settings = {"_target_": "my_defense.ClipFilters", "limit": 1.2}
    ConfigStore.instance().store(group="defense", name="my_defense", node=settings)
    main()
