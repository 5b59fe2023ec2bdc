"""Make a foreign network keep the interface: images in, logits out."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from dhbe.core.errors import ConfigError, got
from dhbe.core.rng import generator
from dhbe.core.types import DataSpec

M = TypeVar("M", bound=nn.Module)


@runtime_checkable
class DataFitted(Protocol):
    """A network with layers that are set from training images, once, before training."""

    def initialise_from(self, images: Tensor) -> None:
        """Set the layers that depend on data from normalised images (N, C, H, W)."""


@torch.no_grad()
def prepared(network: nn.Module, spec: DataSpec) -> list[str]:
    """Make sure that a network maps normalised images (B, C, H, W) to logits (B, classes).

    Marks networks that need contiguous tensors (``x.view`` of feature maps), and puts a logarithm
    behind those that end in softmax, as hooks: names and shapes of the weights stay as they are.

    Returns:
        what was done, in words for the report.

    Raises:
        ConfigError: it takes other images, or gives something else than logits.
    """
    rng = generator(0, "foreign network")
    x = torch.randn((4, *spec.shape), generator=rng)
    network.eval()
    try:
        out = tried(network, x)
    except Exception as error:
        raise ConfigError(
            f"the network does not take images of shape {spec.shape} ({type(error).__name__}: "
            f"{str(error)[:300]}); set data.image_size= and data.channels= to what it takes"
        ) from error
    if isinstance(out, Tensor) and len(out) != len(x):
        raise ConfigError(
            f"the network makes {len(out)} rows of {len(x)} images of shape {spec.shape}, so it "
            "takes others; set data.image_size= and data.channels= to what it takes"
        )
    if not isinstance(out, Tensor):
        raise ConfigError(
            f"the network returns a {type(out).__name__}; expected a tensor of logits "
            f"(B, {spec.classes}): wrap it in a module whose forward returns that part alone"
        )
    if out.shape != (len(x), spec.classes):
        raise got("data.classes", spec.classes, f"the network's outputs, {tuple(out.shape)[1:]}")
    if not probabilities(out):
        return []
    network.register_forward_hook(logits_of)
    return [
        "the network ends in softmax; the defense works on the logarithms of its probabilities, "
        "which are its logits but for a constant per image"
    ]


def tried(network: nn.Module, x: Tensor) -> Any:
    """Raw outputs for images (B, C, H, W), in channels-last memory if the network supports it."""
    try:
        return channels_last(network)(x.contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
    network.register_forward_pre_hook(contiguous_input)
    return contiguous(network)(x)


def probabilities(out: Tensor) -> bool:
    """Whether the rows of outputs (B, K) are in [0, 1] and sum to 1 within 1e-4."""
    inside = bool((out >= 0).all() and (out <= 1).all())
    return inside and torch.allclose(out.sum(1), out.new_ones(len(out)), atol=1e-4)


def logits_of(network: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """Forward hook: probabilities (B, K) -> their logits (B, K), of mean 0 per image."""
    logs = out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    return (logs - logs.mean(1, keepdim=True)).to(out.dtype)


def contiguous_input(network: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Forward pre-hook on images (B, C, H, W); also marks networks with contiguous weights."""
    return (args[0].contiguous(), *args[1:])


def unhooked(network: M) -> M:
    """The network as its author's code makes it, without what ``prepared`` added."""
    for hooks, added in (
        (network._forward_hooks, logits_of),
        (network._forward_pre_hooks, contiguous_input),
    ):
        for key in [k for k, hook in hooks.items() if hook is added]:
            del hooks[key]
    return network


def channels_last(network: M) -> M:
    """The network with channels last in memory, but for parts that need them contiguous."""
    network.to(memory_format=torch.channels_last)
    for part in network.modules():
        if contiguous_input in part._forward_pre_hooks.values():
            contiguous(part)
    return network


def contiguous(network: M) -> M:
    """The network with its weights contiguous in memory."""
    return network.to(memory_format=torch.contiguous_format)
