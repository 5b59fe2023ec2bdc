"""Result folders without a run."""

from __future__ import annotations

import json
from pathlib import Path

import yaml


def write_cell(
    folder: Path,
    *,
    seed: int,
    asr: float,
    defense: str = "dhbe",
    attack: str = "badnets",
    acc: float = 0.8,
    config: dict | None = None,
    **more: object,
) -> None:
    rates = {"acc": 0.9, "asr": 1.0, "asr_conditional": 1.0, "ra": 0.0}
    metrics = {
        "victim": rates,
        "purified": rates | {"acc": acc, "asr": asr},
        "der": (1 - asr - (0.9 - acc) + 1) / 2,
        "counts": {},
        "data": "<b>cifar10</b>",
        "model": "m",
        "attack": attack,
        "defense": defense,
        "budget": "none",
        "selection": "fixed",
        "seed": seed,
        "poison_rate": 0.1,
        "seconds": {"victim": 1.0, "defense": 2.0, "evaluate": 3.0},
        "commit": None,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics | more))
    tree = {"attack": {"name": attack}, "defense": {"name": defense}} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
