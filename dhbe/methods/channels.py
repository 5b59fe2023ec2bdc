"""Channels of BatchNorms: scores of what enters them, and pruning of those that stand out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dhbe.training.compile import eager

Score = Callable[[nn.BatchNorm2d, Tensor], Tensor]
"""(BatchNorm, its input (C, L) over batch and places) -> score of each channel (C,)."""


@torch.no_grad()
def scores_of_inputs(
    network: nn.Module, norms: Sequence[nn.BatchNorm2d], x: Tensor, score: Score
) -> list[Tensor]:
    """Scores (C,) of each BatchNorm's channels in one pass of images (B, C, H, W) in eval mode."""
    found: dict[int, Tensor] = {}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        found[id(norm)] = score(norm, args[0].transpose(0, 1).flatten(1).float())

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        with eager():  # a compiled pass would not call the hooks
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [found[id(norm)] for norm in norms]


@torch.no_grad()
def prune_outliers(norms: Sequence[nn.BatchNorm2d], scores: Sequence[Tensor], u: float) -> str:
    """Set gamma = beta = 0 of channels whose score (C,) exceeds mean + u std of their layer's.

    Returns:
        how many of how many, in words.
    """
    pruned = 0
    for norm, score in zip(norms, scores, strict=True):
        out = score > score.mean() + u * score.std()
        norm.weight[out], norm.bias[out] = 0, 0
        pruned += int(out.sum())
    return f"{pruned} of {sum(norm.num_features for norm in norms)} channels"
