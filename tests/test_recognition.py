"""What a network tells of itself: normalisation, channels, size, outputs; and what defenders do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import dhbe
from benchmarks.layouts import changed, read
from defenses.none import NoDefense
from dhbe.checkpoint import completed
from dhbe.checkpoint.preprocessing import normalized, random_crops, told
from dhbe.config.schema import build, plain
from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import Suspect
from dhbe.data import Budget, DefenderData
from dhbe.data.natural import natural_images, natural_inputs
from dhbe.game import ImageGenerator
from dhbe.models import Normalized
from dhbe.models.interface import contiguous_input, prepared
from dhbe.models.own import channels_of, side_of
from dhbe.models.resnet import CifarResNet, SmallResNet
from tests.conftest import CONF, names, sampled
from tests.support.fixtures import make_spec, small
from tests.support.networks import Flat, Pair, ResNet, Wide

HELD = os.environ.get("DHBE_CHECKPOINTS", "")
needs_checkpoints = pytest.mark.skipif(
    not HELD, reason="set DHBE_CHECKPOINTS to the folder with others' checkpoints"
)
GAME = (
    "defense.epochs=1",
    "defense.iterations=1",
    "defense.warm_up=1",
    "defense.batch_size=8",
    "trainer.threads=1",
)
NARROW = ("defense.width=4", "defense.patch_width=4")


class TheirCNN(nn.Module):
    """Of verazuo's badnets-pytorch: flattened by ``view``, with a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(3, 16, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.conv2 = nn.Sequential(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.AvgPool2d(2))
        self.fc1 = nn.Sequential(nn.Linear(800, 512), nn.ReLU())
        self.fc2 = nn.Sequential(nn.Linear(512, 10), nn.Softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.conv1(x))
        return self.fc2(self.fc1(x.view(x.size(0), -1)))


class TheirLeNet(nn.Module):
    """Of advertorch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.linear1, self.linear2 = nn.Linear(3136, 200), nn.Linear(200, 10)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv2(self.pool(self.conv1(x).relu())).relu())
        return self.linear2(self.linear1(x.view(x.size(0), -1)).relu())


def calibrated(network: nn.Module, images: Tensor) -> nn.Module:
    """The network with the statistics that its BatchNorms have of these images."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    with torch.no_grad():
        network.train()(images)
    return network.eval()


THEIRS = {
    "resnet20-12fca82f.th": (lambda: ResNet(16, (3, 3, 3), classes=10), "imagenet"),
    "resnet56-4bfd9763.th": (lambda: ResNet(16, (9, 9, 9), classes=10), "imagenet"),
    "resnet20-badnets.pt": (lambda: ResNet(16, (3, 3, 3), classes=10), "imagenet"),
    "resnet20-blend.pt": (lambda: ResNet(16, (3, 3, 3), classes=10), "imagenet"),
    "WRN-16-1-S-model_best.pth.tar": (lambda: Wide(classes=10), "none"),
    "badnet-CIFAR10.pth": (TheirCNN, "half"),
    "mnist_lenet5_clntrained.pt": (TheirLeNet, "none"),
}
FACTORIES = {"badnet-CIFAR10.pth": "TheirCNN", "mnist_lenet5_clntrained.pt": "TheirLeNet"}


@needs_checkpoints
@pytest.mark.parametrize("name", THEIRS)
def test_real_checkpoints_are_read_and_handed_back(name: str, tmp_path: Path) -> None:
    """Normalisation without options; the changed copy loads strictly into their code."""
    make, normalisation = THEIRS[name]
    factory = FACTORIES.get(name)
    options = ("model=own", f"model.factory={__file__}:{factory}") if factory else ()
    network, file = read(Path(HELD) / name, options)
    stated = build({"_target_": "dhbe.data.own.statistics", "normalization": normalisation,
                    "channels": network.spec.channels})  # fmt: skip
    assert (network.spec.mean, network.spec.std) == stated
    assert network.spec.image_size == (28 if "lenet" in name else 32)
    changed(network)
    copy = file.write_back(network, tmp_path)
    weights = (
        torch.load(copy, map_location="cpu") if copy.suffix != ".safetensors" else load_file(copy)
    )
    weights = weights.get("state_dict", weights)
    theirs = make().eval()
    theirs.load_state_dict({k.removeprefix("module."): v for k, v in weights.items()}, strict=True)
    x = torch.rand(2, *network.spec.shape)
    with torch.no_grad():
        expected = theirs(network.normalize(x))
        found = network(x).softmax(1) if factory == "TheirCNN" else network(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("preset", "order", "cropped"),
    sampled([("half", "bgr", False), ("none", "rgb", True), ("imagenet", "rgb", True)], 3),
)
def test_the_first_batchnorm_tells_normalisation_and_channels(
    preset: str, order: str, cropped: bool
) -> None:
    images = natural_images(3, 32, 1000)
    assert images is not None
    x = random_crops(images) if cropped else images
    x = normalized(x.flip(1) if order == "bgr" else x, preset)
    torch.manual_seed(2)
    network = calibrated(CifarResNet(widths=[8], blocks=1, classes=4, channels=3, image_size=32), x)
    verdict = told(network, channels=3, image_size=32, classes=4)
    assert (verdict.preset, verdict.order) == (preset, order), verdict.evidence
    for name in ("none", "half", "mnist"):
        assert f"{name} " in verdict.evidence


class Brightness(nn.Module):
    """No BatchNorm; ten classes of images by their brightness, each as frequent as the others."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        images = natural_images(3, 32, 1000)
        assert images is not None
        known = normalized(images, preset).mean((1, 2, 3))
        self.centres = known.quantile((torch.arange(10) + 0.5) / 10)

    def forward(self, x: Tensor) -> Tensor:
        return -1000 * (x.mean((1, 2, 3))[:, None] - self.centres).square()


@pytest.mark.parametrize("preset", ["none", "half", "imagenet", "bytes"])
def test_predictions_tell_the_normalisation_without_batchnorm(preset: str) -> None:
    """Sure of every image under every normalisation: only the classes tell."""
    verdict = told(Brightness(preset), channels=3, image_size=32, classes=10)
    assert verdict.preset == preset, verdict.evidence


def test_one_class_for_every_image_abstains() -> None:
    network = Brightness("half")
    network.centres = network.centres + 10
    assert told(network, channels=3, image_size=32, classes=10).preset is None


def test_a_network_of_other_images_abstains() -> None:
    torch.manual_seed(0)
    strokes = (torch.rand(256, 3, 32, 32) > 0.9).float()
    network = CifarResNet(widths=[8], blocks=1, classes=4, channels=3, image_size=32)
    verdict = told(calibrated(network, strokes), channels=3, image_size=32, classes=4)
    assert verdict.preset is None
    assert "imagenet" in verdict.evidence
    fresh = told(CifarResNet(widths=[8], blocks=1, classes=4, channels=3, image_size=32),
                 channels=3, image_size=32, classes=4)  # fmt: skip
    assert fresh.preset is None, "it has never seen an image"


@pytest.mark.long
def test_statistics_tell_strides_apart(tmp_path: Path, compose_config) -> None:
    """The same weights fit two networks; only through one of them do images pass as in training."""
    images = natural_images(3, 32, 500)
    assert images is not None
    torch.manual_seed(0)
    sizes = {"classes": 4, "channels": 3, "image_size": 32}
    network = SmallResNet(widths=[16, 24], blocks=1, stem_stride=2, **sizes)
    torch.save(calibrated(network, normalized(images, "half")).state_dict(), tmp_path / "w.pt")
    task = ("task=purify", f"checkpoint={tmp_path}/w.pt", "data.image_size=32")
    tree, choices = completed(plain(compose_config(*task)), {})
    assert tree["model"]["stem_stride"] == 2
    assert tree["data"]["normalization"] == "half"
    assert choices["model"] == "resnet_small"


@pytest.mark.long
def test_a_data_set_does_not_override_what_the_network_knows(
    tmp_path: Path, compose_config
) -> None:
    images = natural_images(3, 32, 500)
    assert images is not None
    network = CifarResNet(widths=[16, 32], blocks=1, classes=10, channels=3, image_size=32)
    torch.save(calibrated(network, images).state_dict(), tmp_path / "w.pt")
    task = ("victim=checkpoint", f"victim.path={tmp_path}/w.pt", "model=inferred", "data=cifar10")
    tree, _ = completed(plain(compose_config(*task)), {})
    assert tree["data"]["mean"] == [0.0, 0.0, 0.0]
    assert any(
        "normalisation none instead of the data set's" in n for n in tree["victim"]["assumed"]
    )
    told_off = ("task=purify", f"checkpoint={tmp_path}/w.pt", "data.normalization=cifar10")
    tree, _ = completed(plain(compose_config(*told_off, "data.image_size=32")), {})
    assert tree["data"]["normalization"] == "cifar10", "the user's word counts"
    assert any(
        n.startswith("WARNING: data.normalization=cifar10") for n in tree["victim"]["assumed"]
    )


@pytest.mark.long
def test_generated_images_keep_the_range_that_a_network_knows(compose_config) -> None:
    """Natural statistics behind none and half; the published 0 and 1 for every data set's own."""
    raw = make_spec(mean=(0.0,) * 3, std=(1.0,) * 3)
    statistics = natural_inputs(raw)
    assert statistics is not None
    torch.manual_seed(0)
    generator = ImageGenerator(latent=8, width=4, channels=3, image_size=16, statistics=statistics)
    x = generator(torch.randn(64, 8))
    torch.testing.assert_close(
        x.mean((0, 2, 3)), torch.tensor([0.4914, 0.4822, 0.4465]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        x.std((0, 2, 3)), torch.tensor([0.247, 0.243, 0.261]), atol=1e-3, rtol=0
    )
    half, _ = natural_inputs(make_spec(mean=(0.5,) * 3, std=(0.5,) * 3)) or ([], [])
    assert half == pytest.approx([-0.0172, -0.0356, -0.107], abs=1e-4)
    for name in names("data"):
        if name != "own":
            assert natural_inputs(build(plain(compose_config(f"data={name}"))["data"]).spec) is None
    assert (CONF / "data").exists()


class Nothing(Defense):
    """Finds nothing to do."""

    def repair(self, network: Normalized, data: DefenderData, runtime) -> Normalized:
        return network


def test_a_defense_that_changed_nothing_says_so(make_runtime, caplog) -> None:
    suspect = Suspect(network=small(1), architecture="resnet_tiny", spec=make_spec())
    data = DefenderData(Budget(), pool=None, train_size=0, seed=0)
    for defense, warned in ((Nothing(), True), (NoDefense(), False)):
        runtime = make_runtime(work=type(defense).__name__)
        caplog.clear()
        defense(suspect, data, runtime)
        said = [
            n for n in runtime.recorder.notes if n.startswith("WARNING: Nothing changed no weight")
        ]
        assert bool(said) is warned
        assert ("changed no weight" in caplog.text) is warned


def test_any_module_is_purified_in_memory() -> None:
    """``view`` of feature maps, a softmax at the end; sizes found by trying."""
    model = Flat(channels=3, side=32, softmax=True).eval()
    purified = dhbe.purify(
        model, normalization="half", defense="dhbe_guided", overrides=[*GAME, *NARROW]
    )
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(purified(x).sum(1), torch.ones(4))
    assert not torch.equal(purified(x), model(x))
    assert not purified._forward_hooks
    assert not purified._forward_pre_hooks
    model.load_state_dict(purified.state_dict(), strict=True)


class Perceptron(nn.Module):
    """Images of any shape are cut into rows, several of one image where it is larger."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(pixels, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(x.reshape(-1, self.linear.in_features))
        return logits


@pytest.mark.parametrize(
    ("pixels", "channels", "side"),
    [(784, 1, 28), (3072, 3, 32), (12288, 3, 64), (1000, None, None)],
)
def test_linear_layers_tell_what_images_they_take(
    pixels: int, channels: int | None, side: int | None
) -> None:
    network = Perceptron(pixels)
    assert channels_of(network) == channels
    assert side_of(network, channels or 3) == side


@pytest.mark.long
def test_what_is_no_classifier_of_images_is_refused() -> None:
    for model, options, message in (
        (Pair(), {"image_size": 32, "classes": 5}, "returns a tuple; expected a tensor of logits"),
        (Pair(), {}, "image_size=None: expected a number of pixels"),
        (Flat(), {"image_size": 32, "classes": 5}, r"does not take images of shape \(1, 32, 32\)"),
        (Perceptron(784), {"image_size": 56, "classes": 5}, "makes 16 rows of 4 images"),
        (Flat(), {"classes": 7}, "data.classes=7: expected the network's outputs"),
        (nn.Flatten(0), {"image_size": 8}, "to logits"),
    ):
        with pytest.raises(ConfigError, match=message):
            dhbe.purify(model, **options)  # type: ignore[arg-type]


def test_networks_that_need_contiguous_tensors_are_marked() -> None:
    spec = make_spec(channels=1, image_size=28, classes=5)
    network = Flat()
    assert prepared(network, spec) == []
    assert list(network._forward_pre_hooks.values()) == [contiguous_input]
    plain_network = ResNet()
    prepared(plain_network, make_spec(classes=5))
    assert not plain_network._forward_pre_hooks


def test_factories_are_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import helper\nfrom torch import nn\n"
        "def build(num_classes, in_channels=1):\n    return helper.make(num_classes, in_channels)\n"
        "def number(): return 3\ndef broken(): raise OSError('no disk')\n"
    )
    (tmp_path / "helper.py").write_text(
        "from torch import nn\ndef make(n, c):\n"
        "    return nn.Sequential(nn.Conv2d(c, 4, 3), nn.Flatten(), nn.Linear(4 * 26 * 26, n))\n"
    )
    from dhbe.models.own import own

    given = {"options": {}, "sha256": "", "classes": 6, "channels": 3, "image_size": 28}
    assert own(factory=f"{tmp_path}/mine.py:build", **given)(torch.zeros(1, 3, 28, 28)).shape == (
        1,
        6,
    )
    for factory, message in (
        ("mine.py", "expected FILE.py:NAME or package.module:NAME"),
        (f"{tmp_path}/no.py:build", "no file"),
        (f"{tmp_path}/mine.py:absent", "AttributeError"),
        ("no_such_module:build", "ModuleNotFoundError"),
        (f"{tmp_path}/mine.py:number", "returns a torch.nn.Module, not"),
        (f"{tmp_path}/mine.py:broken", r"failed \(OSError: no disk\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            own(factory=factory, **given)
