"""Channels of BatchNorms: scores of what enters them, and pruning of those that stand out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dhbe.data import ImageSet
from dhbe.methods.masks import batch_norms
from dhbe.models import Normalized
from dhbe.training.compile import eager
from dhbe.training.runtime import Runtime

Score = Callable[[nn.BatchNorm2d, Tensor], Tensor]
"""(BatchNorm, its inputs (B, C, H, W)) -> score of each channel (C,)."""


def prune_by_inputs(
    network: Normalized,
    images: ImageSet,
    score: Score,
    *,
    u: float,
    count: int,
    method: str,
    runtime: Runtime,
) -> None:
    """Score channels on a batch of ``count`` of the images and prune those that stand out.

    Raises:
        ConfigError: the network has no BatchNorm.
    """
    norms = batch_norms(network, method=method)
    drawn = torch.randperm(len(images), generator=runtime.rng(method))[:count]
    scores = scores_of_inputs(network, norms, runtime.tensor(images.subset(drawn)), score)
    pruned = prune_outliers([*scores], [*scores.values()], u)
    runtime.recorder.notes.append(f"{method} pruned {pruned}, by {len(drawn)} images")


@torch.no_grad()
def scores_of_inputs(
    network: nn.Module, norms: Sequence[nn.BatchNorm2d], x: Tensor, score: Score
) -> dict[nn.BatchNorm2d, Tensor]:
    """Scores (C,) of the channels of those that one pass of images (B, C, H, W) goes through.

    The network is in eval mode.
    """
    found: dict[nn.BatchNorm2d, Tensor] = {}

    def look(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        found[norm] = score(norm, args[0].float())

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    try:
        with eager():  # a compiled pass would not call the hooks
            network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


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
