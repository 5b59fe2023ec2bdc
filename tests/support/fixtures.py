"""Fixtures and small objects: a tiny data set, composed configs, a runtime that leaves no trace."""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from dhbe.config.resolvers import register_resolvers
from dhbe.core.types import DataSpec
from dhbe.data import Resident
from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet
from dhbe.training.runtime import Runtime
from dhbe.training.trainer import TrainerConfig
from tests.conftest import CONF

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_finish() -> None:
    """Commands shall find this process as it is before the first test."""
    if commands := sys.modules.get("tests.support.commands"):
        commands.SERVER.begin()


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
    """As Hydra does, which chooses the files first and then sets values."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    files = [o for o in parsed if (CONF / o.key_or_group).is_dir()]
    config = copy.deepcopy(_chosen(tuple(str(o.input_line) for o in files)))
    ConfigLoaderImpl._apply_overrides_to_config([o for o in parsed if o not in files], config)
    return config


_load = FileConfigSource.load_config


@functools.cache
def _read(folder: str, file: str) -> ConfigResult:
    """One file is a part of many configs."""
    return _load(FileConfigSource("tests", folder), file)


def _remembered(source: FileConfigSource, config_path: str) -> ConfigResult:
    return copy.deepcopy(_read(source.path, config_path))


@functools.cache
def _chosen(files: tuple[str, ...]) -> DictConfig:
    """Composing takes 0.3 seconds, and many tests choose the same files."""
    register_resolvers()
    GlobalHydra.instance().clear()
    with (
        initialize_config_dir(str(CONF), version_base="1.3"),
        patch.object(FileConfigSource, "load_config", _remembered),
    ):
        return compose("config", overrides=list(files))


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
