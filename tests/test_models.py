"""Networks: sizes, shapes, every model config, input space."""

from __future__ import annotations

import pytest
import torch
from hydra.utils import instantiate

from dhbe.config.schema import plain
from dhbe.core.errors import ConfigError
from dhbe.models import Normalized
from tests.conftest import names, sampled
from tests.support.fixtures import make_spec

PARAMETERS = {
    "resnet18": 11_173_962,
    "preact_resnet18": 11_171_146,
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_40_2": 2_243_546,
    "airbench": 1_972_792,
    "vgg19_bn": 20_040_522,
    "resnet_tiny": 174_274,
}
"""Published or counted by hand for 10 classes of 32-pixel colour images."""


def build(name: str, compose_config, **kind):
    named = {
        "own": ["model.factory=dhbe.models.other:vgg19_bn"],
        "timm": ["model.name=resnet10t"],
        "torchvision": ["model.name=mobilenet_v2"],
    }
    extra = named.get(name, [])
    node = plain(compose_config(f"model={name}", *extra))["model"]
    return instantiate(node, _convert_="all", **kind)


@pytest.mark.parametrize("name", sampled([n for n in names("model") if n != "inferred"], 6))
def test_every_model_gives_logits(name: str, compose_config) -> None:
    network = build(name, compose_config, classes=10, channels=3, image_size=32).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    if name in PARAMETERS:
        assert sum(p.numel() for p in network.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", ["resnet_tiny", "wrn_16_1", "vgg_small", "resnet18"])
def test_grayscale_of_28_pixels(name: str, compose_config) -> None:
    network = build(name, compose_config, classes=7, channels=1, image_size=28).eval()
    assert network(torch.randn(1, 1, 28, 28)).shape == (1, 7)


def test_unknown_timm_name_suggests_others(compose_config) -> None:
    node = plain(compose_config("model=timm", "model.name=resnet_that_is_not"))["model"]
    with pytest.raises(Exception, match="some that are") as error:
        instantiate(node, classes=2, channels=3, image_size=32, _convert_="all")
    assert isinstance(error.value.__cause__, ConfigError)


def test_normalisation_is_the_first_layer() -> None:
    spec = make_spec(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    model = Normalized(torch.nn.Identity(), spec)
    x = torch.rand(2, 3, 16, 16)
    out = model(x)
    torch.testing.assert_close(out[:, 1], (x[:, 1] - 0.2) / 0.25)
    torch.testing.assert_close(model.denormalize(out), x)
