"""Forward hooks: outputs of inner modules, stage by stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.errors import ConfigError
from dhbe.models import Normalized


@contextmanager
def capture(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """List that holds, after a forward pass, the modules' outputs in their given order."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(position: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs[position] = output

        return hook

    hooks = [m.register_forward_hook(keep(i)) for i, m in enumerate(modules)]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


class Dropout(nn.Module):
    """Zeroes values with probability ``share`` and scales the others, drawn from ``rng``."""

    rng: torch.Generator

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Activations of any shape -> the same shape."""
        drawn = torch.rand(x.shape, generator=self.rng, device=self.rng.device)
        return x * (drawn >= self.share).to(x.dtype) / (1 - self.share)


@contextmanager
def inserted(
    layer: nn.Module, *, before: Iterable[nn.Module], after: Iterable[nn.Module]
) -> Iterator[None]:
    """While the block lasts, ``layer`` stands before some modules of a network and after others."""
    hooks = [m.register_forward_pre_hook(lambda _, args: layer(*args)) for m in before]
    hooks += [m.register_forward_hook(lambda _, __, output: layer(output)) for m in after]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def frozen_statistics(
    network: nn.Module, x: Tensor, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``network(x)``, x (B, C, H, W), in its mode; BatchNorm's running statistics stay.

    Args:
        weights: other values for parameters, by name; gradients flow into them.
    """
    buffers = {k: b.clone() for k, b in network.named_buffers() if "running" in k or "tracked" in k}
    values = {**buffers, **(weights or {})}
    out: Tensor = torch.func.functional_call(network, values, (x,))
    return out


@torch.no_grad()
def stages(network: nn.Module, probe: Tensor) -> list[nn.Module]:
    """The module that completes each spatial resolution, from fine to coarse.

    For a ResNet its stages, for a plain VGG the last layer before each pooling. Networks without
    feature maps (transformers) have none.

    Args:
        network: in eval mode.
        probe: any input (B, C, H, W) that the network accepts.
    """
    last: dict[int, nn.Module] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[-1] > 1:
            last[output.shape[-1]] = module

    hooks = [m.register_forward_hook(hook) for m in network.modules()]
    try:
        network(probe)
    finally:
        for h in hooks:
            h.remove()
    return [last[size] for size in sorted(last, reverse=True)]


@torch.no_grad()
def executed_after(network: nn.Module, cut: nn.Module, probe: Tensor) -> list[Any]:
    """Layers with weights that run after ``cut``, in order, for a probe (B, C, H, W)."""
    done: list[bool] = []
    found: list[Any] = []

    def finish(module: nn.Module, args: Any, output: Any) -> None:
        done.append(True)

    def start(module: nn.Module, args: Any) -> None:
        if done:
            found.append(module)

    layers = [m for m in network.modules() if hasattr(m, "reset_parameters")]
    hooks = [cut.register_forward_hook(finish)]
    hooks += [m.register_forward_pre_hook(start) for m in layers]
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def smooth_cam(
    network: Normalized,
    x: Tensor,
    label: int,
    seed: int,
    *,
    copies: int = 8,
    noise: float = 0.1,
) -> Tensor:
    """Where an image (C, H, W) shows a class: SmoothGrad-CAM++ (H, W) on the last feature map.

    Omeiza et al. 2019, averaged over noisy copies.

    Raises:
        ConfigError: the network has no feature map.
    """
    found = stages(network, network.probe())
    if not found:
        raise ConfigError(
            "the network has no feature maps, so no class-activation map; use another defense"
        )
    rng = torch.Generator().manual_seed(seed)
    blur = torch.randn((copies, *x.shape), generator=rng).to(x.device, x.dtype)
    inputs = (x + noise * blur).requires_grad_(True)
    with torch.enable_grad(), capture(found[-1:]) as seen:
        score = network(inputs)[:, label].sum()
        (gradient,) = torch.autograd.grad(score, seen[0])
    maps = seen[0].detach()
    square, cube = gradient.square(), gradient**3
    below = 2 * square + (maps * cube).sum(dim=(2, 3), keepdim=True)
    weight = square / torch.where(below == 0, 1, below)
    heat = (
        ((weight * gradient.relu()).sum(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu().mean(0)
    )
    enlarged: Tensor = F.interpolate(heat[None, None], size=x.shape[-2:], mode="bilinear")
    return enlarged[0, 0]
