"""Stored victims that somebody edited, hashes included: noticed by what they do."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhbe.config.identity import fingerprint
from dhbe.core.errors import ArtefactError
from dhbe.experiment import pipeline
from dhbe.victim import train
from tests.conftest import ROOT

TINY = ("data.limit=300", "data.train_size=7600", "model.widths=[16,24]", "victim.epochs=2")
TINY += ("trainer.threads=1", "defense=none")
CHOICES = {"data": "tiny", "model": "resnet_tiny", "attack": "badnets", "defense": "none"}
Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one victim."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from dhbe.config.resolvers import register_resolvers

    register_resolvers()
    GlobalHydra.instance().clear()
    place = tmp_path_factory.mktemp("made")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", [*TINY, f"paths.victims={place}/victims"])
    found = pipeline.run(config, place / "out", CHOICES)
    assert found["cached_victim"] is False
    return place / "victims"


def again(compose_config: Compose, tmp_path: Path, made: Path, change: Callable[[dict], None]):
    """Edit the victim with all hashes mended, and run on it."""
    shutil.copytree(made, tmp_path / "victims")
    (weights,) = (tmp_path / "victims").glob("[!.]*/victim.safetensors")
    tensors = load_file(weights)
    change(tensors)
    save_file(tensors, weights)
    about = json.loads((weights.parent / "victim.json").read_text())
    about["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    about.pop("seal")
    about["seal"] = fingerprint(about)
    (weights.parent / "victim.json").write_text(json.dumps(about))
    return pipeline.run(compose_config(*TINY), tmp_path / "out", CHOICES)


def shuffled(tensors: dict[str, Tensor]) -> None:
    tensors["codes"] = tensors["codes"].roll(1)


def forgetful(tensors: dict[str, Tensor]) -> None:
    """Another network in its place."""
    for key in [k for k in tensors if k.startswith("network.") and k.endswith("weight")]:
        tensors[key] = torch.zeros_like(tensors[key])


def harmless(tensors: dict[str, Tensor]) -> None:
    """The trigger no longer is what the victim learnt."""
    for key in [k for k in tensors if k.startswith("attack.") and tensors[k].is_floating_point()]:
        tensors[key] = torch.zeros_like(tensors[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shuffled, "indicator is not that of its seed"),
        (forgetful, "on training images, but .* when it was made"),
        (harmless, "change .* on training images, but .* when it was made"),
    ],
    ids=["codes", "network", "attack state"],
)
def test_an_edit_with_mended_hashes_is_noticed(
    compose_config: Compose, tmp_path: Path, made: Path, change, message: str
) -> None:
    with pytest.raises(ArtefactError, match=rf"{message}.*: edited; delete .* to train it anew"):
        again(compose_config, tmp_path, made, change)


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"acc": 0.99}, "acc .* on training images, but 0.99 when it was made"),
        ({"asr": None}, "asr .* on training images, but None when it was made"),
        ({"change": "large"}, "change .* on training images, but large when it was made"),
        ({"ra": 1.0}, "ra None on training images, but 1.0 when it was made"),
        ({}, "acc .* on training images, but None when it was made"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_forged_figures_with_mended_hashes_are_noticed(
    compose_config: Compose, tmp_path: Path, made: Path, rates: dict, message: str
) -> None:
    shutil.copytree(made, tmp_path / "victims")
    (file,) = (tmp_path / "victims").glob("[!.]*/victim.json")
    about = json.loads(file.read_text())
    about.pop("seal")
    about["measured"] = about["measured"] | rates if rates else {}
    file.write_text(json.dumps(about | {"seal": fingerprint(about)}))
    train._verified.clear()
    with pytest.raises(ArtefactError, match=rf"{message}.*; delete .* to train it anew"):
        pipeline.run(compose_config(*TINY), tmp_path / "out", CHOICES)


def test_an_untouched_victim_passes_and_is_measured_once(
    compose_config: Compose, tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    measure = train.measure
    monkeypatch.setattr(train, "measure", lambda *a: asked.append(1) or measure(*a))
    found = again(compose_config, tmp_path, made, lambda tensors: None)
    assert found["cached_victim"]
    pipeline.run(compose_config(*TINY, "seed=0"), tmp_path / "second", CHOICES)
    assert len(asked) == 1


def test_an_edit_of_what_stands_beside_the_weights_is_noticed(
    compose_config: Compose, tmp_path: Path, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(made, tmp_path / "victims")
    (about,) = (tmp_path / "victims").glob("[!.]*/victim.json")
    found = json.loads(about.read_text())
    about.write_text(json.dumps(found | {"seconds": 1e9}))
    with pytest.raises(ArtefactError, match=r"victim.json: edited; delete"):
        pipeline.run(compose_config(*TINY), tmp_path / "out", CHOICES)
    for key in ("seal", "measured"):
        found.pop(key)
    about.write_text(json.dumps(found))
    train._verified.clear()
    kept = pipeline.run(compose_config(*TINY), tmp_path / "out", CHOICES)
    assert kept["cached_victim"]
    assert "made by an earlier version, without rates to compare it with" in caplog.text
