"""Kinds of files that people hold: read and right, or refused with a remedy that works.

    python -m benchmarks.layouts > docs/results/formats.md

Every kind is written by its authors' own code or layout, read by one command's config, compared on
images with the network it came from, changed, written back and read again. Of a refused kind the
advice in the message is followed first. ``tests/test_layouts.py`` runs the same list.
"""

from __future__ import annotations

import copy
import functools
import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dhbe.api import composed
from dhbe.checkpoint import CheckpointFile, completed
from dhbe.config.schema import build
from dhbe.core.errors import DHBEError
from dhbe.models import Normalized
from dhbe.models.interface import logits_of, probabilities
from dhbe.victim.source import build_network
from tests.support.networks import VGG, Doubled, First, Flat, PreAct, ResNet, Wide, shaken
from tests.support.writers import Weights, backdoorbench, lightning, prefixed, timm_script

SIZE = 16
"""Pixels, for networks that take any number."""
HERE = "tests.support.networks"
Save = Callable[[nn.Module, Path], Path]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of file.

    Args:
        network: as its authors write it.
        save: writes it below a folder and returns what is given to ``checkpoint=``.
        options: the user's further choices.
        refused: pattern of the refusal, if it comes.
        remedy: the options that it advises instead, or a conversion that gives another file.
        inside: the network among several that is meant.
    """

    name: str
    network: Callable[[], nn.Module] = ResNet
    save: Save
    options: tuple[str, ...] = (f"data.image_size={SIZE}",)
    refused: str = ""
    remedy: tuple[str, ...] | Save | None = None
    advice: str = ""
    inside: str = ""


def torch_save(wrap: Callable[[Weights], Any], **how: Any) -> Save:
    """``torch.save`` of what is made of a state dict."""

    def save(network: nn.Module, folder: Path) -> Path:
        torch.save(wrap(network.state_dict()), folder / "given.pt", **how)
        return folder / "given.pt"

    return save


plain = torch_save(lambda w: w)


def trained(w: Weights) -> dict[str, Any]:
    """Optimizer state, keyed as torch did up to 1.4."""
    first = next(iter(w.values()))
    return {"state": {140_234_567_890_123: {"momentum_buffer": first}}, "param_groups": []}


def other(w: Weights) -> Weights:
    """Other numbers under the same names."""
    return {k: v + 1 for k, v in w.items()}


def renamed(*rules: tuple[str, str]) -> Callable[[Weights], Weights]:
    """Keys of another implementation of the same network."""

    def apply(weights: Weights) -> Weights:
        found = {}
        for key, value in weights.items():
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            found[key] = value
        return found

    return apply


def named_by_transformers(w: Weights) -> Weights:
    """Torchvision's ResNet under the keys of ``transformers.ResNetForImageClassification``."""
    stem = "resnet.embedder.embedder."
    found = {}
    for key, value in w.items():
        if m := re.fullmatch(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)", key):
            norm = m[3] == "bn" or (m[3], m[4]) == ("downsample.", "1")
            part = "normalization" if norm else "convolution"
            where = "shortcut" if m[3] == "downsample." else f"layer.{int(m[4]) - 1}"
            key = f"resnet.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}.{where}.{part}.{m[5]}"
        key = re.sub(r"^conv1\.", f"{stem}convolution.", key)
        key = re.sub(r"^bn1\.", f"{stem}normalization.", key)
        found[re.sub(r"^fc\.", "classifier.1.", key)] = value
    return found


def hub(wrap: Callable[[Weights], Weights] = dict, shards: int = 1, **config: Any) -> Save:
    """A folder as on Hugging Face's hub, in one or several parts."""

    def save(network: nn.Module, folder: Path) -> Path:
        target = folder / "hub"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        weights = {k: v.contiguous() for k, v in wrap(network.state_dict()).items()}
        if shards == 1:
            save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
            return target
        places: dict[str, str] = {}
        for i in range(shards):
            name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            part = dict(list(weights.items())[i::shards])
            save_file(part, target / name)
            places |= dict.fromkeys(part, name)
        (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return target

    return save


def distributed(network: nn.Module, folder: Path) -> Path:
    """As ``torch.distributed.checkpoint.save`` writes it."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": network.state_dict()}, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def joined(network: nn.Module, folder: Path) -> Path:
    """What the refusal of a distributed checkpoint advises."""
    module = "torch.distributed.checkpoint.format_utils"
    target = folder / "weights.pt"
    command = [sys.executable, "-m", module, "dcp_to_torch", str(folder / "dcp"), str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return target


def runs(network: nn.Module, folder: Path) -> Path:
    """A folder of a training's checkpoints."""
    plain(network, folder)
    torch.save(network.state_dict(), folder / "epoch_1.pt")
    return folder


def arrays(w: Weights) -> dict[str, Any]:
    """Numpy arrays instead of tensors."""
    return {"model": {k: v.numpy() for k, v in w.items()}}


def npz(network: nn.Module, folder: Path) -> Path:
    """``numpy.savez``."""
    np.savez(folder / "given.npz", **{k: v.numpy() for k, v in network.state_dict().items()})
    return folder / "given.npz"


def from_npz(network: nn.Module, folder: Path) -> Path:
    """The way back to torch."""
    held = np.load(folder / "given.npz")
    torch.save({k: torch.from_numpy(held[k]) for k in held}, folder / "given.pt")
    return folder / "given.pt"


def parametrised(how: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    """The network with all convolutions parametrised."""

    def make() -> nn.Module:
        network = shaken(ResNet())
        for module in list(network.modules()):
            if isinstance(module, nn.Conv2d):
                how(module)
        return network

    return make


def pruned(module: nn.Module) -> None:
    """The smallest half of the weights removed, as torch.nn.utils.prune does it."""
    prune.l1_unstructured(module, "weight", amount=0.5)


def wrap(*keys: str) -> Save:
    """The state dict below some keys."""

    def nested(w: Weights) -> Any:
        for key in reversed(keys):
            w = {key: w, "epoch": 3}  # type: ignore[dict-item]
        return w

    return torch_save(nested)


def buffers(w: Weights) -> Weights:
    """A normalisation layer beside the network."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    return w | {"normalize.mean": mean.view(3, 1, 1), "normalize.std": std.view(3, 1, 1)}


def own(name: str, *more: str) -> tuple[str, ...]:
    """A factory of the user's."""
    return ("model=own", f"model.factory={HERE}:{name}", *more)


def widths(**options: Any) -> Callable[[], nn.Module]:
    """A CIFAR ResNet of another form."""
    return lambda: ResNet(**options)


SIDE = (f"data.image_size={SIZE}",)
AGAIN = "torch.save\\(model.state_dict\\(\\), "
KINDS: list[Kind] = [
    Kind(name="state dict on top", save=plain),
    Kind(
        name="of torch before 1.6",
        save=torch_save(lambda w: w, _use_new_zipfile_serialization=False),
    ),
    *(
        Kind(name=f"under {'.'.join(keys)}", save=wrap(*keys))
        for keys in (
            *(("model",), ("state_dict",), ("net",), ("model_state_dict",), ("model_state",)),
            *(("classifier",), ("ema",), ("model_ema",), ("state_dict_ema",), ("student",)),
            *(("teacher",), ("checkpoint", "model"), ("model", "state_dict"), ("weights",)),
        )
    ),
    *(
        Kind(name=f"keys behind {prefix}", save=torch_save(lambda w, p=prefix: prefixed(w, p)))
        for prefix in (
            "module.",
            "_orig_mod.",
            "module._orig_mod.",
            "_forward_module.",
            "backbone.",
        )
    ),
    Kind(
        name="averaged (module. and n_averaged)",
        save=torch_save(lambda w: {"n_averaged": torch.tensor(9)} | prefixed(w, "module.")),
    ),
    Kind(name="in a list", save=torch_save(lambda w: [7, w])),
    Kind(
        name="in a tuple, before its optimizer",
        save=torch_save(lambda w: (w, {"param_groups": []})),
    ),
    Kind(name="numpy arrays", save=torch_save(arrays)),
    Kind(
        name="half precision",
        save=torch_save(
            lambda w: {k: v.half() if v.is_floating_point() else v for k, v in w.items()}
        ),
    ),
    Kind(
        name="optimizer state of torch 1.4 beside it",
        save=torch_save(lambda w: {"state_dict": w, "optimizer": trained(w)}),
    ),
    Kind(name="model and model_ema", save=torch_save(lambda w: {"model": w, "model_ema": w})),
    Kind(
        name="timm: state_dict and state_dict_ema",
        save=torch_save(lambda w: timm_script(w, classes=5, image_size=SIZE)),
    ),
    Kind(
        name="Lightning, with a loss that has weights",
        save=torch_save(lambda w: lightning(w, classes=5, image_size=SIZE)),
    ),
    Kind(
        name="BackdoorBench attack_result.pt",
        save=torch_save(
            lambda w: backdoorbench(w, classes=5, image_size=SIZE) | {"model_name": "resnet20"}
        ),
    ),
    Kind(
        name="GAN attack: netC beside netG",
        save=torch_save(lambda w: {"netC": w, "netG": other(w)}),
    ),
    Kind(
        name="student and teacher",
        save=torch_save(lambda w: {"student": w, "teacher": other(w)}),
        refused="several sets of weights; name one by key=, of: student, teacher",
        remedy=(*SIDE, "key=student"),
        advice="`key=student`",
    ),
    Kind(
        name="student. and teacher. in one state dict",
        network=Doubled,
        save=torch_save(lambda w: {"state_dict": w}),
        refused="name one by key=, of: state_dict.student, state_dict.teacher",
        remedy=(*SIDE, "key=state_dict.student"),
        advice="`key=state_dict.student`",
        inside="student",
    ),
    Kind(
        name="two networks with names of their own",
        save=torch_save(lambda w: {"net_a": w, "net_b": other(w)}),
        refused="name one by key=, of: net_a, net_b",
        remedy=(*SIDE, "key=net_a"),
        advice="`key=net_a`",
    ),
    Kind(name="normalize.mean and .std in the file", save=torch_save(buffers)),
    Kind(
        name="normalize.mean and .std against the config's",
        save=torch_save(buffers),
        options=(*SIDE, "data.normalization=cifar10"),
        refused="data.normalization=cifar10: expected null: the file has its own",
        remedy=SIDE,
        advice="without `data.normalization=`",
    ),
    Kind(
        name="ResNet-20 of He et al. (akamaster)",
        network=widths(width=16, blocks=(3, 3, 3)),
        save=plain,
    ),
    Kind(name="ResNet-56", network=widths(width=16, blocks=(9, 9, 9)), save=plain),
    Kind(name="the same, width 1", network=widths(width=1), save=plain),
    Kind(
        name="the same, width 10, unequal stages",
        network=widths(width=10, blocks=(2, 1, 3)),
        save=plain,
    ),
    Kind(
        name="the same, 1 channel of 28 pixels",
        network=widths(channels=1),
        save=plain,
        options=("data.image_size=28",),
    ),
    Kind(name="the same, 2 channels", network=widths(channels=2), save=plain),
    Kind(name="the same, 4 channels", network=widths(channels=4), save=plain),
    Kind(
        name="thin ResNet-34 with convolved shortcuts",
        network=widths(blocks=(3, 4, 6, 3), convolved=True),
        save=plain,
    ),
    Kind(
        name="ResNet-18, kuangliu's layout",
        network=widths(width=64, blocks=(2, 2, 2, 2), convolved=True),
        save=plain,
    ),
    Kind(name="head called fc, dropout in it", network=widths(head="fc", dropout=True), save=plain),
    Kind(name="head called classifier", network=widths(head="classifier"), save=plain),
    Kind(name="PreAct-ResNet-18, BackdoorBench's layout", network=PreAct, save=plain),
    Kind(name="WRN-16-1, NAD's layout", network=Wide, save=plain),
    Kind(name="WRN-10-2, the same", network=lambda: Wide(10, 2), save=plain),
    Kind(name="VGG-11-BN, kuangliu's", network=VGG, save=plain, options=("data.image_size=32",)),
    Kind(
        name="torchvision ResNet-18",
        network=lambda: torchvision.models.resnet18(num_classes=5),
        save=plain,
        options=("data.image_size=64",),
    ),
    *(
        Kind(name=name, network=network, save=plain, options=("data.image_size=32",))
        for name, network in {
            "torchvision MobileNetV2": lambda: torchvision.models.mobilenet_v2(num_classes=5),
            "torchvision DenseNet-121": lambda: torchvision.models.densenet121(num_classes=5),
            "torchvision EfficientNet-B0": lambda: torchvision.models.efficientnet_b0(
                num_classes=5
            ),
            "timm ConvNeXt": lambda: timm.create_model("convnext_atto", num_classes=5),
        }.items()
    ),
    Kind(
        name="timm ViT",
        network=lambda: timm.create_model(
            "vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8
        ),
        save=plain,
        options=(),
    ),
    Kind(
        name="hub folder of timm",
        network=lambda: timm.create_model("resnet18", num_classes=5),
        save=hub(architecture="resnet18", num_classes=5),
        options=("data.image_size=64",),
    ),
    Kind(
        name="hub folder of transformers, ResNet",
        network=lambda: torchvision.models.resnet18(num_classes=5),
        save=hub(named_by_transformers, id2label=dict.fromkeys("01234", "x")),
        options=("data.image_size=64",),
    ),
    Kind(name="hub folder in three parts", save=hub(shards=3)),
    Kind(name="weight norm", network=parametrised(parametrizations.weight_norm), save=plain),
    Kind(name="pruned", network=parametrised(pruned), save=plain),
    Kind(
        name="own network: 28 pixels told by its linear layer",
        network=Flat,
        save=plain,
        options=(),
        refused=r"no known network has its 6 weights.*model=own model.factory=",
        remedy=own("Flat"),
        advice="`model=own model.factory=mynet.py:build`",
    ),
    Kind(
        name="own network with softmax",
        network=lambda: Flat(3, 32, True),
        save=plain,
        options=own(
            "Flat",
            *("+model.options.channels=3", "+model.options.side=32", "+model.options.softmax=true"),
        ),
    ),
    Kind(
        name="own network that returns features too",
        network=First,
        save=plain,
        options=own("Pair", *SIDE, "data.classes=5"),
        refused="returns a tuple; expected a tensor of logits",
        remedy=own("First", *SIDE),
        advice="a module that returns the logits alone",
    ),
    Kind(
        name="distributed checkpoint (DCP)",
        save=distributed,
        refused="format_utils dcp_to_torch",
        remedy=joined,
        advice="`dcp_to_torch`",
    ),
    Kind(
        name="folder of a training's checkpoints",
        save=runs,
        refused="name one of its files: epoch_1.pt, given.pt",
        remedy=lambda network, folder: folder / "epoch_1.pt",
        advice="the file's name",
    ),
    Kind(
        name="list of tensors without names",
        save=torch_save(lambda w: list(w.values())),
        refused=AGAIN,
        remedy=plain,
        advice="`torch.save(model.state_dict(), ...)`",
    ),
    Kind(
        name="optimizer alone",
        save=torch_save(trained),
        refused=AGAIN,
        remedy=plain,
        advice="`torch.save(model.state_dict(), ...)`",
    ),
    Kind(
        name="numpy.savez",
        save=npz,
        refused="npz",
        remedy=from_npz,
        advice="`torch.from_numpy` of its arrays",
    ),
]


def check(kind: Kind, folder: Path) -> str:
    """Read, compare, change, write back and read again; what happened, in words.

    Raises:
        AssertionError: it is not as the list says.
    """
    network = shaken(kind.network()) if "parametr" not in str(kind.network) else kind.network()
    path, options, said = kind.save(network, folder), kind.options, "read"
    if kind.refused:
        try:
            read(path, options)
        except DHBEError as error:
            refusal = str(error)
        else:
            refusal = "not refused"
        assert re.search(kind.refused, refusal), f"{kind.name}: {refusal}"
        said = f"refused; {kind.advice}"
        if isinstance(kind.remedy, tuple):
            options = kind.remedy
        elif kind.remedy is not None:
            path = kind.remedy(network, folder)
    ours, file = read(path, options)
    theirs = network.get_submodule(kind.inside).eval()
    compare(kind.name, ours, theirs)
    changed(ours)
    (folder / "out").mkdir()
    written = file.write_back(ours, folder / "out")
    again = build_like(ours)
    CheckpointFile(
        path=str(written), key=None if written.suffix == ".safetensors" else file.key
    ).load_into(again)
    x = torch.rand((2, *ours.spec.shape))
    with torch.no_grad():
        first, second = ours(x), again(x)
    assert alike(kind.name, first, second), f"{kind.name}: written back differently"
    return said


def build_like(network: Normalized) -> Normalized:
    """The same architecture and normalisation with other weights."""
    import copy

    copied = copy.deepcopy(network)
    changed(copied)
    return copied


@torch.no_grad()
def changed(network: nn.Module) -> None:
    """Move every weight a little."""
    for parameter in network.parameters():
        parameter.mul_(1.01)


@torch.no_grad()
def compare(name: str, ours: Normalized, theirs: nn.Module) -> None:
    """Whether both give the same logits for the same images."""
    x = torch.rand((3, *ours.spec.shape), generator=torch.Generator().manual_seed(1))
    expected = theirs(ours.normalize(x))
    if probabilities(expected):
        expected = logits_of(theirs, (), expected)
    assert alike(name, ours(x), expected), f"{name}: other logits"


def alike(name: str, found: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal but for rounding."""
    loose = 5e-3 if "half" in name else 1e-4
    return torch.allclose(found, expected, atol=loose * float(expected.abs().max()))


@functools.cache
def _composed(options: tuple[str, ...]) -> dict[str, Any]:
    """Many kinds have the same options, and composing takes a tenth of a second."""
    return composed(["task=purify", "checkpoint=given", *options])


def read(path: Path, options: Iterable[str]) -> tuple[Normalized, CheckpointFile]:
    """The network as ``task=purify checkpoint=PATH`` makes it."""
    tree = copy.deepcopy(_composed(tuple(options)))
    tree["victim"]["path"] = str(path)
    tree, _ = completed(tree, {})
    network = build_network(tree, build(tree["data"]).spec, 1).eval()
    file: CheckpointFile = build(tree["victim"])
    file.load_into(network)
    return network, file


def main() -> None:
    """Print the table."""
    warnings.simplefilter("ignore")
    print(
        "# Kinds of files\n\n`python -m benchmarks.layouts` writes this page: every kind is made,"
    )
    print("read, compared with the network it came from, changed, written back and read again.\n")
    print("| kind | what happens |\n|---|---|")
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {kind.name} | {check(kind, Path(folder))} |", flush=True)
    print(f"\n{len(KINDS)} kinds.")


if __name__ == "__main__":
    main()
