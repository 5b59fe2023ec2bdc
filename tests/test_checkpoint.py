"""Other people's files: read as data, recognised, purified in their own format."""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from conftest import make_spec
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.checkpoint import Checkpoint, CheckpointFile, completed
from dhbe.errors import ArtefactError, ConfigError
from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet

Weights = dict[str, Tensor]


def small(seed: int = 0) -> Normalized:
    """Network with every BatchNorm buffer away from its default."""
    torch.manual_seed(seed)
    spec = make_spec()
    network = SmallResNet(
        widths=[16, 24], blocks=1, stem_stride=2, classes=4, channels=3, image_size=16
    )
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(torch.rand(value.shape).mul(3).to(value.dtype))
    return Normalized(network, spec).eval()


def prefixed(weights: Weights, prefix: str) -> Weights:
    return {prefix + k: v for k, v in weights.items()}


def lightning(weights: Weights) -> dict[str, Any]:
    """As ``Trainer.save_checkpoint`` writes it."""
    return {
        "epoch": 4,
        "global_step": 1955,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict(prefixed(weights, "model."))
        | {"criterion.weight": torch.ones(4)},
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 5}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [
            {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []}
        ],
        "lr_schedulers": [{"milestones": Counter([3, 5])}],
        "hparams_name": "kwargs",
        "hyper_parameters": AttributeDict(learning_rate=0.1, num_classes=4),
    }


def backdoorbench(weights: Weights) -> dict[str, Any]:
    """As ``save_attack_result`` of BackdoorBench writes it."""
    poisoned = {
        "bd_data_container": {
            "save_folder_path": "record/badnet/bd_train_dataset",
            "data_dict": {i: {"path": f"{i}.png", "other_info": (3, i, 1, 0)} for i in range(20)},
        },
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": np.arange(50),
        "poison_indicator": np.array([0, 1] * 25),
        "save_folder_path": None,
    }
    return {
        "model_name": "resnet_small",
        "num_classes": 4,
        "model": weights,
        "data_path": "../data",
        "img_size": [16, 16, 3],
        "clean_data": "cifar10",
        "bd_train": poisoned,
        "bd_test": poisoned,
    }


def timm_script(weights: Weights) -> dict[str, Any]:
    """As timm's ``train.py`` writes it."""
    args = argparse.Namespace(model="resnet_small", num_classes=4, mean=None, std=None)
    state = {"epoch": 9, "arch": "resnet_small", "version": 2, "args": args, "metric": 71.5}
    return state | {"state_dict": weights, "state_dict_ema": weights, "optimizer": {"state": {}}}


WRAPPINGS: dict[str, Callable[[Weights], Any]] = {
    "plain": dict,
    "data parallel": lambda w: {"net": prefixed(w, "module."), "acc": 93.1, "epoch": 199},
    "compiled": lambda w: prefixed(w, "_orig_mod."),
    "lightning": lightning,
    "backdoorbench": backdoorbench,
    "timm": timm_script,
    "parameters": lambda w: {k: nn.Parameter(v, requires_grad=False) for k, v in w.items()},
    "views of one storage": lambda w: one_storage(w),
    "normalisation in front": lambda w: (
        prefixed(w, "1.")
        | {"0.mean": torch.tensor([0.4, 0.5, 0.6]), "0.std": torch.tensor([0.2, 0.25, 0.3])}
    ),
}


def one_storage(weights: Weights) -> Weights:
    floats = {k: v for k, v in weights.items() if v.is_floating_point()}
    flat = torch.cat([v.flatten() for v in floats.values()])
    views = flat.split([v.numel() for v in floats.values()])
    joined = {k: p.view_as(v) for (k, v), p in zip(floats.items(), views, strict=True)}
    return {k: joined.get(k, v) for k, v in weights.items()}


def without_weights(content: Any) -> Any:
    """The rest of a file, comparable."""
    if isinstance(content, dict):
        return {k: without_weights(v) for k, v in content.items()}
    if isinstance(content, (list, tuple)):
        return [without_weights(v) for v in content]
    if isinstance(content, np.ndarray):
        return content.tolist()
    return "tensor" if isinstance(content, Tensor) else content


def purified_copy(file: Path, folder: Path) -> tuple[Path, Weights]:
    """Write the file back with all weights doubled (counters too); returns the new weights."""
    network = small(7)
    checkpoint = CheckpointFile(path=str(file))
    checkpoint.load_into(network)
    with torch.no_grad():
        for value in network.network.state_dict().values():
            value.mul_(2)
    before = file.read_bytes()
    target = checkpoint.write_back(network, folder)
    assert file.read_bytes() == before, "the input stays as it is"
    return target, network.network.state_dict()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_every_wrapping_is_read_and_written_back(
    tmp_path: Path, wrapping: str, legacy: bool
) -> None:
    source = small(1)
    content = WRAPPINGS[wrapping](source.network.state_dict())
    file = tmp_path / "given.pt"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    target = small(2)
    CheckpointFile(path=str(file)).load_into(target)
    for key, value in source.network.state_dict().items():
        assert torch.equal(target.network.state_dict()[key], value), key

    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(file, tmp_path / "out")
    assert copy.name == "given-purified.pt"
    back = torch.load(copy, weights_only=False)  # our own test data; numpy arrays need it
    assert without_weights(back) == without_weights(content)
    again = small(3)
    CheckpointFile(path=str(copy)).load_into(again)
    for key, value in doubled.items():
        assert torch.equal(again.network.state_dict()[key], value), key
    if wrapping == "plain":
        small(4).network.load_state_dict(back, strict=True)
        torch.load(copy, mmap=not legacy, weights_only=True)


def test_safetensors_with_metadata_and_half_precision(tmp_path: Path) -> None:
    weights = {
        k: v.half() if v.is_floating_point() else v
        for k, v in small(1).network.state_dict().items()
    }
    save_file(weights, tmp_path / "given.safetensors", metadata={"format": "pt"})
    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(tmp_path / "given.safetensors", tmp_path / "out")
    back = load_file(copy)
    assert {k: v.dtype for k, v in back.items()} == {k: v.dtype for k, v in weights.items()}
    for key, value in doubled.items():
        assert torch.equal(back[key], value.to(back[key].dtype)), key


def test_weights_that_outgrow_their_type_are_not_written(tmp_path: Path) -> None:
    weights = {
        k: v.half() if v.is_floating_point() else v
        for k, v in small(1).network.state_dict().items()
    }
    torch.save(weights, tmp_path / "given.pt")
    network = small(2)
    checkpoint = CheckpointFile(path=str(tmp_path / "given.pt"))
    checkpoint.load_into(network)
    with torch.no_grad():
        network.network.head.weight.fill_(1e6)
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtefactError, match=r"head.weight does not fit torch.float16"):
        checkpoint.write_back(network, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["script", "trace", "export"])
def test_weights_of_programs_are_recovered_unexecuted(tmp_path: Path, kind: str) -> None:
    """Only the numbers come out again: the program's code has not been read."""
    source = small(1).network
    file = tmp_path / "given.pt2"
    x = torch.zeros(2, 3, 16, 16)
    if kind == "export":
        torch.export.save(torch.export.export(source, (x,)), file)
    else:
        program = torch.jit.script(source) if kind == "script" else torch.jit.trace(source, x)
        torch.jit.save(program, file)
    (tmp_path / "out").mkdir()
    copy, doubled = purified_copy(file, tmp_path / "out")
    assert copy.name == "given-purified.safetensors"
    if kind != "export":
        loaded = torch.jit.load(file)
        loaded.load_state_dict(load_file(copy), strict=True)
        assert torch.equal(loaded.state_dict()["head.weight"], doubled["head.weight"])
    for key, value in load_file(copy).items():
        assert torch.equal(value, doubled[key]), key


# ---------------------------------------------------------------- networks, recognised


class TheirBlock(nn.Module):
    """Basic block of pytorch-cifar and BackdoorBox."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class TheirPreAct(nn.Module):
    """Pre-activation block of BackdoorBench; ``wide`` names things as xternalz's Wide ResNet."""

    def __init__(self, width_in: int, width: int, stride: int, wide: bool = False) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.skip = None
        if stride != 1 or width_in != width:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.skip = "convShortcut" if wide else "shortcut"
            setattr(self, self.skip, conv if wide else nn.Sequential(conv))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        skipped = getattr(self, self.skip)(out) if self.skip else x
        return self.conv2(F.relu(self.bn2(self.conv1(out)))) + skipped


class Theirs(nn.Module):
    """ResNet-18 in the layouts of the field; four stages of two blocks."""

    def __init__(self, block: Any, *, stem_norm: bool, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64) if stem_norm else None
        for i, (a, b) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)]):
            layer = nn.Sequential(block(a, b, 1 if i == 0 else 2), block(b, b, 1))
            setattr(self, f"layer{i + 1}", layer)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = x if self.bn1 is None else F.relu(self.bn1(x))
        for i in range(4):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.linear(x.mean((2, 3)))


class TheirWide(nn.Module):
    """WRN-16-1 of xternalz, NAD and ANP."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for i, (a, b) in enumerate([(16, 16), (16, 32), (32, 64)]):
            stage = nn.Module()
            stage.layer = nn.Sequential(
                TheirPreAct(a, b, 1 if i == 0 else 2, True), TheirPreAct(b, b, 1, True)
            )
            setattr(self, f"block{i + 1}", stage)
        self.bn1, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for i in range(3):
            x = getattr(self, f"block{i + 1}").layer(x)
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


def cifar_stem() -> nn.Module:
    network = timm.create_model("resnet18", num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    return network


FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, int]] = {
    "BackdoorBox ResNet18": (lambda: Theirs(TheirBlock, stem_norm=True), "resnet18", 32),
    "BackdoorBench PreAct": (lambda: Theirs(TheirPreAct, stem_norm=False), "preact_resnet18", 32),
    "Wide ResNet": (TheirWide, "wrn_16_1", 32),
    "timm resnet18": (cifar_stem, "resnet18", 32),
    "torchvision mobilenet": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=10),
        "torchvision",
        32,
    ),
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=10), "resnet18", 64),
    "timm vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=10, img_size=32, patch_size=4
        ),
        "timm",
        32,
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_their_networks_are_recognised_and_compute_the_same(
    tmp_path: Path, compose_config, name: str
) -> None:
    from dhbe.config import plain
    from dhbe.pipeline import assemble, build_network

    make, label, size = FOREIGN[name]
    torch.manual_seed(3)
    theirs = make().eval()
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if "running" in key:
                value.add_(torch.rand_like(value))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    cfg = compose_config(
        "task=purify",
        f"checkpoint={tmp_path}/theirs.pth",
        f"data.image_size={size}",
        "data.normalization=half",
    )
    tree, choices = completed(plain(cfg), {})
    assert choices["model"] == label
    parts = assemble(tree)
    network = build_network(tree, parts.spec, 0)
    parts.victim.load_into(network)
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        expected, found = theirs((x - 0.5) / 0.5), network.eval()(x)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_files_answer_what_the_config_leaves_open(tmp_path: Path, compose_config) -> None:
    from dhbe.config import plain

    content = backdoorbench(Theirs(TheirPreAct, stem_norm=False, classes=4).state_dict())
    torch.save(content | {"model_name": "preactresnet18"}, tmp_path / "attack_result.pt")
    cfg = compose_config("task=purify", f"checkpoint={tmp_path}/attack_result.pt")
    tree, choices = completed(plain(cfg), {})
    assert choices["model"] == "preact_resnet18"
    data = tree["data"]
    assert (data["classes"], data["channels"], data["image_size"]) == (4, 3, 16)
    assert data["normalization"] == "cifar10"
    assert tree["victim"]["assumed"] == []


def test_what_is_not_known_is_said(tmp_path: Path, compose_config) -> None:
    from dhbe.config import plain

    file = tmp_path / "plain.pt"
    torch.save(small(1).network.state_dict(), file)
    task = ("task=purify", f"checkpoint={file}")
    with pytest.raises(ConfigError, match=r"model.stem_stride=1; .*model.stem_stride=2"):
        completed(plain(compose_config(*task)), {})
    chosen = compose_config(*task, "model=resnet_tiny", "model.widths=[16,24]")
    tree, _ = completed(plain(chosen), {})
    size, normalisation = tree["victim"]["assumed"]
    assert "data.image_size=32 is assumed" in size
    assert "data.normalization=cifar10 is assumed" in normalisation


def test_misfits_are_listed(tmp_path: Path) -> None:
    weights = small(1).network.state_dict()
    weights["head.weight"] = torch.zeros(7, 24)
    weights["extra.weight"] = weights.pop("stem.0.weight")
    torch.save(weights, tmp_path / "odd.pt")
    with pytest.raises(ArtefactError) as caught:
        CheckpointFile(path=str(tmp_path / "odd.pt")).load_into(small(2))
    for part in ("missing stem.0.weight", "unknown extra.weight", "(7, 24), expected (4, 24)"):
        assert part in str(caught.value)


def test_tensors_outside_the_network_are_listed(tmp_path: Path) -> None:
    torch.save(lightning(small(1).network.state_dict()), tmp_path / "last.ckpt")
    checkpoint = Checkpoint(tmp_path / "last.ckpt")
    assert set(checkpoint.others) == {"criterion.weight"}
    assert checkpoint.facts["num_classes"] == 4


def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "given.pt"
    torch.save(small(1).network.state_dict(), file)
    checkpoint = CheckpointFile(path=str(file), sha256="0" * 64)
    with pytest.raises(ArtefactError, match="changed during the run"):
        checkpoint.load_into(small(2))
    file.unlink()
    with pytest.raises(ArtefactError, match="no such file"):
        checkpoint.load_into(small(2))
