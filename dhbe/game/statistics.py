"""Distance of a batch from a network's BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dhbe.training.compile import eager
from dhbe.training.parallel import Processes


def with_statistics(network: nn.Module) -> list[nn.BatchNorm2d]:
    """BatchNorms of the network that keep running means and variances, in order of definition."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    return [norm for norm in norms if norm.running_mean is not None]


@contextmanager
def statistics_gaps(network: nn.Module, processes: Processes) -> Iterator[list[Tensor]]:
    """List that holds, after a pass in eval mode, each BatchNorm's distance from its statistics.

    The mean over channels of (mean - running mean)^2 / running variance + log^2 of the ratio of
    variances, of the BatchNorm's input over batch and places; 0 where both agree. Matching them is
    DeepInversion's feature prior (Yin et al., CVPR 2020), here in units of the layer's own scale.
    The list stays empty for a network without BatchNorm2d that keeps statistics.

    Args:
        processes: that share the batch.
    """
    gaps: list[Tensor] = []

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        x = args[0].to(torch.promote_types(args[0].dtype, torch.float32))
        x = x - norm.running_mean.view(1, -1, 1, 1)  # small means, so that no digits cancel
        shift = processes.all_reduce_mean(x.mean((0, 2, 3)))
        square = processes.all_reduce_mean(x.square().mean((0, 2, 3)))
        variance = norm.running_var + norm.eps
        spread = ((square - shift.square()).clamp_min(0) + norm.eps) / variance
        gaps.append((shift.square() / variance + spread.log().square()).mean())

    hooks = [norm.register_forward_pre_hook(look) for norm in with_statistics(network)]
    try:
        with eager():  # a compiled pass would not call the hooks
            yield gaps
    finally:
        for hook in hooks:
            hook.remove()
