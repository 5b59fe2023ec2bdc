"""Other people's files from end to end: recognised, purified, written back, the same network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dhbe.checkpoint import CheckpointFile, preprocessing
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.evaluation import evidence
from dhbe.evaluation.evidence import Probe
from dhbe.experiment.assembly import assemble
from dhbe.experiment.pipeline import run
from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet
from dhbe.victim.source import build_network
from tests.conftest import tiered
from tests.support.fixtures import small
from tests.support.networks import PreAct, Wide
from tests.support.writers import Wrapped, backdoorbench, prefixed, save_all

PROBE = ("probe.images=4", "probe.steps=1", "probe.width=4", "trainer.threads=1")
GAME = (
    *("defense=dhbe", "defense.epochs=1", "defense.iterations=1", "defense.batch_size=4"),
    *("defense.student_moves=1", "defense.width=4", "defense.patch_width=4"),
)


def cifar_stem() -> nn.Module:
    network = timm.create_model("resnet18", num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "BackdoorBench PreAct": (lambda: PreAct(classes=10), "preact_resnet18", 32),
    "Wide ResNet": (lambda: Wide(classes=10), "wrn_16_1", 32),
    "timm resnet18": (cifar_stem, "resnet18", 32),
    "torchvision mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        "torchvision",
        32,
    ),
    "timm vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=8
        ),
        "timm",
        32,
    ),
}


def purified(
    compose_config, file: Path, folder: Path, *overrides: str, **choices: str
) -> dict[str, Any]:
    """``python run.py task=purify checkpoint=FILE``, in this process."""
    cfg = compose_config("task=purify", f"checkpoint={file}", *PROBE, *overrides)
    return run(cfg, folder, {"attack": "none", "data": "own", "defense": "given"} | choices)


def read(compose_config, file: Path, *overrides: str) -> Normalized:
    """The network that a file holds, as the pipeline reads it."""
    cfg = compose_config("task=purify", f"checkpoint={file}", *overrides)
    tree, _ = resolved(plain(cfg), {})
    parts = assemble(tree)
    network = build_network(tree, parts.spec, 0)
    parts.source.load_into(network)
    return network.eval()


@pytest.mark.parametrize("name", tiered(FOREIGN, "Wide ResNet".__eq__))
def test_their_networks_are_recognised_purified_and_load_back(
    tmp_path: Path, compose_config, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """One step of a defense; then their code with the new file computes what ours does."""
    monkeypatch.setattr(preprocessing, "PIXELS", 0)  # the normalisation is given: a short look
    make, label, size = FOREIGN[name]
    torch.manual_seed(3)
    theirs = make().eval()
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if "running" in key:
                value.add_(torch.rand_like(value))
    file = tmp_path / "theirs.pth"
    prefix = "" if name.startswith("BackdoorB") else "module."
    weights = prefixed(theirs.state_dict(), prefix)
    if name.startswith("BackdoorBench"):
        content = backdoorbench(weights, classes=10, image_size=size, images=1000)
        torch.save(content | {"model_name": "preactresnet18"}, file)
    else:
        torch.save({"state_dict": weights} if prefix else weights, file)
    sizes = (f"data.image_size={size}", "data.normalization=half")
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        before, ours = theirs((x - 0.5) / 0.5), read(compose_config, file, *sizes)(x)
    assert torch.allclose(ours, before, atol=1e-4 * float(before.abs().max()))

    metrics = purified(compose_config, file, tmp_path / "out", *sizes, *GAME)
    assert metrics["model"] == label
    copy = torch.load(tmp_path / "out" / "theirs-purified.pth", weights_only=False)  # our own
    copy = copy.get("model", copy.get("state_dict", copy))
    theirs.load_state_dict({k.removeprefix(prefix): v for k, v in copy.items()}, strict=True)
    again = read(compose_config, tmp_path / "out" / "purified.safetensors", *sizes)
    with torch.no_grad():
        after, ours = theirs((x - 0.5) / 0.5), again(x)
    assert torch.allclose(ours, after, atol=1e-4 * float(after.abs().max()))
    assert not torch.allclose(after, before, rtol=1e-3), "the defense changed something"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::UserWarning")
def test_every_format_gives_the_same_result(tmp_path: Path, compose_config) -> None:
    """The same network in every file: same rates, same purified weights, strictly loadable."""
    torch.manual_seed(1)
    source = small(1)
    for layer in source.modules():  # predictions shall differ between images
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    for label in range(4):
        (tmp_path / "test" / str(label)).mkdir(parents=True)
        for i in range(10):
            colour = np.random.default_rng(10 * label + i).integers(0, 256, 3).tolist()
            Image.new("RGB", (16, 16), tuple(colour)).save(tmp_path / f"test/{label}/{i}.png")
    files = save_all(source.network, tmp_path, classes=4, image_size=16)
    assert len(files) == 18
    options = (
        *("model=resnet_tiny", "model.widths=[16,24]", "model.blocks=1", "data.image_size=16"),
        *(
            "data.normalization=pytorch_cifar",
            f"data.test={tmp_path}/test",
            "attack=badnets",
            "defense=clp",
        ),
        "defense.u=0.5",
    )
    found, weights = {}, {}
    for name, file in files.items():
        out = tmp_path / "out" / file.name
        found[name] = purified(
            compose_config, file, out, *options, attack="badnets", model="resnet_tiny"
        )
        weights[name] = load_file(out / "purified.safetensors")
        written = next(out.glob("given*-purified.*"))
        doubled = small(2)
        CheckpointFile(path=str(written)).load_into(doubled)
        for key, value in doubled.network.state_dict().items():
            assert torch.equal(value, weights[name][f"network.{key}"]), (name, key)
    by_lightning = tmp_path / "out" / files["written by Lightning itself"].name
    copy = torch.load(next(by_lightning.glob("given*.ckpt")), weights_only=True)["state_dict"]
    Wrapped(small(3).network, 4).load_state_dict(copy, strict=True)
    first, *others = found.values()
    assert first["victim"] != first["purified"]
    for other in others:
        for role in ("victim", "purified"):
            assert other[role] == first[role]
            assert other["counts"][role] == first["counts"][role]
    first_weights, *other_weights = weights.values()
    for other in other_weights:
        assert all(torch.equal(other[k], v) for k, v in first_weights.items())


@pytest.mark.parametrize(
    ("channels", "size", "classes"),
    [(1, 28, 10), (2, 32, 2), pytest.param(3, 224, 1000, marks=pytest.mark.long)],
    ids=str,
)
def test_any_channels_sizes_and_classes(
    tmp_path: Path, compose_config, channels: int, size: int, classes: int
) -> None:
    kind = {"classes": classes, "channels": channels, "image_size": size}
    network = SmallResNet(widths=[16, 16], blocks=1, stem_stride=2, **kind)
    file = tmp_path / "given.safetensors"
    save_file(network.state_dict(), file, {"stem_stride": "2"})
    options = (f"data.image_size={size}", "data.normalization=none", *GAME)
    metrics = purified(compose_config, file, tmp_path / "out", *options)
    assert len(metrics["evidence"]["reach"]["victim"]) == classes
    assert ("first 4 of 1000 classes" in " ".join(metrics["notes"])) == (classes == 1000)
    back = load_file(tmp_path / "out" / "given-purified.safetensors")
    SmallResNet(widths=[16, 16], blocks=1, stem_stride=2, **kind).load_state_dict(back, strict=True)


def test_evidence_in_portions_is_the_same(monkeypatch, make_runtime) -> None:
    """Class impressions do not depend on how many fit into memory."""
    network = small(1).requires_grad_(False)
    probe = Probe(images=20, steps=3, patch_size=5, width=4, latent=8)
    whole = probe.impressions(network, make_runtime(), "victim")
    monkeypatch.setattr(evidence, "AT_ONCE", 8 * 16 * 16)
    assert len(evidence.parts(whole)) == 3
    pieces = probe.impressions(network, make_runtime(), "victim")
    assert torch.allclose(whole, pieces, atol=0.05)  # total variation is a mean over the portion
    rates, patches = probe.reach(network, whole, make_runtime())
    assert len(rates) == 4
    assert len(patches) == 8


def test_a_network_that_stayed_as_it_is_is_looked_at_once(make_runtime) -> None:
    network, other = small(1), small(2)
    probe = Probe(images=6, steps=1, patch_size=5, width=4, latent=8)
    once = probe(network, copy.deepcopy(network), make_runtime())
    twice = probe(network, other, make_runtime())
    assert (once.agreement.hits, once.agreement.total, twice.agreement.total) == (6, 6, 12)
    assert once.reach["victim"] == once.reach["purified"]
    assert once.pictures.keys() == twice.pictures.keys()
