"""Shared fixtures: a tiny data set, composed configs, and a runtime that leaves no trace."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from dhbe.config.resolvers import register_resolvers
from dhbe.core.types import DataSpec
from dhbe.data import Resident
from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet
from dhbe.training.runtime import Runtime
from dhbe.training.trainer import TrainerConfig

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

ROOT = Path(__file__).parent.parent
CONF = ROOT / "conf"


def names(group: str) -> list[str]:
    """All configs of a group."""
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


@pytest.fixture
def compose_config(tmp_path: Path) -> Callable[..., DictConfig]:
    """Function that composes a config from overrides, with all outputs in a temporary folder."""
    outputs = {"paths.victims": f"{tmp_path}/victims", "paths.results": f"{tmp_path}/results"}

    def composed(*overrides: str) -> DictConfig:
        config = copy.deepcopy(_composed(overrides))
        for key in outputs.keys() - {o.partition("=")[0] for o in overrides}:
            OmegaConf.update(config, key, outputs[key])
        return config

    return composed


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    """Composing takes 0.1 seconds, and many tests ask for the same config."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.fixture
def spec() -> DataSpec:
    """What a tiny data set looks like."""
    return make_spec()


def make_spec(**changes: Any) -> DataSpec:
    """16-pixel colour images in 4 classes, unless changed."""
    channels = changes.get("channels", 3)
    known = {
        "name": "tiny",
        "classes": 4,
        "channels": channels,
        "image_size": 16,
        "mean": (0.5,) * channels,
        "std": (0.25,) * channels,
        "flip": True,
        "crop_padding": 2,
        "balanced": True,
    }
    return DataSpec(**(known | changes))


@pytest.fixture
def images(spec: DataSpec) -> Resident:
    """80 random images, 20 per class."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (80, *spec.shape), generator=rng, dtype=torch.uint8)
    return Resident(pixels, torch.arange(80) % spec.classes)


@pytest.fixture
def make_runtime(tmp_path: Path) -> Callable[..., Runtime]:
    """Runtimes on the CPU."""

    def make(seed: int = 0, work: str = "work", precision: str = "32-true", **more: Any) -> Runtime:
        config = TrainerConfig(
            device="cpu",
            precision=precision,  # type: ignore[arg-type]
            threads=0,
            progress="never",
            observe_every=0,
            **more,
        )
        return Runtime(trainer_config=config, seed=seed, workdir=tmp_path / work)

    return make


needs_data = pytest.mark.skipif(
    "DHBE_DATA" not in os.environ, reason="set DHBE_DATA to the folder with the real data sets"
)


def small(seed: int = 0) -> Normalized:
    """Network with every BatchNorm buffer away from its default."""
    torch.manual_seed(seed)
    network = tiny_resnet(make_spec(), [16, 24])
    with torch.no_grad():
        for value in network.network.state_dict().values():
            value.add_(torch.rand(value.shape).mul(3).to(value.dtype))
    return network.eval()


def tiny_resnet(spec: DataSpec, widths: list[int]) -> Normalized:
    """An untrained residual network of one block a stage, for the images of ``spec``."""
    kind = {"classes": spec.classes, "channels": spec.channels, "image_size": spec.image_size}
    return Normalized(SmallResNet(widths=widths, blocks=1, stem_stride=2, **kind), spec)
