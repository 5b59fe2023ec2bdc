"""Our side of a comparison: small networks, and defenses that train in a plain loop."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from dhbe.config.resolvers import register_resolvers
from dhbe.config.schema import plain
from dhbe.core.types import Batch, DataSpec
from dhbe.data import Resident
from dhbe.models import Normalized
from dhbe.models.resnet import SmallResNet
from dhbe.training.runtime import Runtime
from dhbe.training.supervised import cross_entropy
from dhbe.training.trainer import TrainerConfig

CONF = Path(__file__).parents[2] / "conf"
SPEC = DataSpec(
    name="random",
    classes=10,
    channels=3,
    image_size=32,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    flip=True,
    crop_padding=4,
    balanced=True,
)


@functools.cache
def config(group: str, name: str) -> dict[str, Any]:
    """The published values of a method."""
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose("config", overrides=[f"{group}={name}", "scale=paper"]))[group]


def defense(name: str, **options: Any) -> Any:
    """A defense of ``conf/defense`` with other values for some options, at every depth."""
    return instantiate(changed(config("defense", name), options), _convert_="all")


def attack(name: str, spec: DataSpec = SPEC, **options: Any) -> Any:
    """An attack of ``conf/attack`` with other values for some options."""
    node = changed(config("attack", name), options)
    return instantiate(node, _partial_=True, _convert_="all")(spec=spec)


def changed(node: Any, options: dict[str, Any]) -> Any:
    """A config with some values replaced wherever their key occurs."""
    if not isinstance(node, dict):
        return node
    return {k: options.get(k, changed(v, options)) for k, v in node.items()}


def network(widths: Sequence[int] = (8, 12), spec: DataSpec = SPEC, seed: int = 0) -> Normalized:
    """A random residual network in eval mode whose BatchNorms differ from their start."""
    torch.manual_seed(seed)
    kind = {"classes": spec.classes, "channels": spec.channels, "image_size": spec.image_size}
    net = Normalized(SmallResNet(widths=[*widths], blocks=1, stem_stride=2, **kind), spec)
    head = scattered(net).network.head
    head.weight.data.mul_(20)
    with torch.no_grad():  # so that predictions differ
        head.bias -= net(torch.rand(64, *spec.shape)).mean(0)
    return net


def scattered(net: Any) -> Any:
    """A network with random BatchNorms, in eval mode."""
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d)):
        for value in (norm.weight.data, norm.running_var):
            value.uniform_(0.5, 1.5)
        for value in (norm.bias.data, norm.running_mean):
            value.uniform_(-0.5, 0.5)
    return net.eval()


class Given(list[Any]):
    """Batches (images, labels); as the authors' loaders they know a data set, by its length."""

    @property
    def dataset(self) -> range:
        """As long as all batches together."""
        return range(sum(len(y) for _, y in self))


def batches(count: int, size: int, spec: DataSpec = SPEC) -> Given:
    """Random images in [0, 1] and labels."""
    rng, dtype = torch.Generator().manual_seed(1), torch.get_default_dtype()
    return Given(
        (
            (torch.randint(256, (size, *spec.shape), generator=rng).float() / 255).to(dtype),
            torch.randint(spec.classes, (size,), generator=rng),
        )
        for _ in range(count)
    )


class Loader(list[Any]):
    """Batches (images, labels) that are the same in every epoch, as our losses get them."""

    def __iter__(self) -> Any:
        for step, (x, y) in enumerate(super().__iter__(), start=1):
            none = torch.zeros(len(y), dtype=torch.long)
            rng = torch.Generator().manual_seed(step)
            yield Batch(x, y, none, torch.arange(len(y)), rng, step / len(self))

    def set_epoch(self, epoch: int) -> None:
        """All epochs are alike."""


@dataclass(kw_only=True)
class Plain(Runtime):
    """Trains in a plain loop, always on the same batches, with the first learning rate."""

    given: Given

    def stage(self, name: str) -> Plain:
        """Every training is one of this run."""
        return self

    def batches(self, *_: Any, **__: Any) -> Any:
        """The given ones."""
        return Loader(self.given)

    def train(
        self,
        network: nn.Module,
        images: Any,
        schedule: Any,
        *,
        loss: Any = cross_entropy,
        train_mode: bool = True,
        before_epoch: Any = None,
        after_step: Any = None,
        clip: float | None = None,
        **_: Any,
    ) -> None:
        """In place, for the epochs of the schedule."""
        optimizer = schedule.optimizer(network)
        for epoch in range(schedule.epochs):
            network.train(train_mode)
            if before_epoch:
                before_epoch(epoch / schedule.epochs)
            for batch in Loader(self.given):
                value = loss(network, batch)
                optimizer.zero_grad()
                value.backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(network.parameters(), clip)
                optimizer.step()
                if after_step:
                    after_step()


def runtime(given: Given) -> Plain:
    """On the CPU, in double precision."""
    config = TrainerConfig(
        device="cpu", precision="64-true", threads=0, progress="never", observe_every=0
    )
    return Plain(trainer_config=config, seed=0, workdir=Path(), given=given)


def repaired(method: Any, net: Normalized, given: Given) -> Normalized:
    """A copy of the network after the defense, trained on the given batches."""
    data = MagicMock()
    pixels = torch.cat([x for x, _ in given]).mul(255).round().byte()
    images = Resident(pixels, torch.cat([y for _, y in given]))
    data.clean.return_value = data.poisoned.return_value = images
    found: Normalized = method.repair(copy.deepcopy(net), data, runtime(given))
    return found


def twin(net: nn.Module, kind: type[nn.Module], official: type[nn.Module]) -> Any:
    """A copy whose layers of one kind are of the authors' class, with the same state."""
    net = copy.deepcopy(net)
    for parent in [*net.modules()]:
        for name, layer in [*parent.named_children()]:
            if isinstance(layer, kind):
                if isinstance(layer, nn.Conv2d):
                    size = (layer.in_channels, layer.out_channels, layer.kernel_size)
                    new = official(*size, layer.stride, layer.padding, bias=layer.bias is not None)
                else:
                    new = official(layer.num_features)
                new.load_state_dict(layer.state_dict(), strict=False)
                setattr(parent, name, new.train(layer.training))
    return net


def apart(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """The largest absolute difference of tensors in the same order."""
    pairs = zip(ours, theirs, strict=True)
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)


def weights(net: nn.Module) -> list[Tensor]:
    """Parameters, in order of definition."""
    return [*net.parameters()]
