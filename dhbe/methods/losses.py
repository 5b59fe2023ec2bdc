"""Losses as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _neighbour_differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Differences of neighbours to the right, below, above right and below right."""
    return (
        x[:, :, :, :-1] - x[:, :, :, 1:],
        x[:, :, :-1, :] - x[:, :, 1:, :],
        x[:, :, 1:, :-1] - x[:, :, :-1, 1:],
        x[:, :, :-1, :-1] - x[:, :, 1:, 1:],
    )


def total_variation_l1(x: Tensor) -> Tensor:
    """Sum over four directions of the mean absolute difference of neighbours (B, C, H, W)."""
    return torch.stack([d.abs().mean() for d in _neighbour_differences(x)]).sum()


def neighbour_norms(x: Tensor) -> Tensor:
    """Frobenius norms (4,) of the differences in four directions, over the whole batch tensor."""
    return torch.stack([torch.linalg.vector_norm(d) for d in _neighbour_differences(x)])


def total_variation_l2(x: Tensor) -> Tensor:
    """Sum over four directions of the un-squared Frobenius norm of differences, x (B, C, H, W).

    DeepInversion's prior. It grows with the square root of the batch size.
    """
    return neighbour_norms(x).sum()


def disagreement(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference () of logits (B, K), over batch and classes."""
    return (a - b).abs().mean()


def neighbour_l1(x: Tensor) -> Tensor:
    """Mean absolute differences of vertical and of horizontal neighbours (B, C, H, W), summed."""
    return x.diff(dim=2).abs().mean() + x.diff(dim=3).abs().mean()


def total_variation_squared(x: Tensor) -> Tensor:
    """Squared differences of vertical and horizontal neighbours, mean over x (B, C, H, W)."""
    down, right = x.diff(dim=2).square().sum(), x.diff(dim=3).square().sum()
    return (down + right) / x.numel()


def mean_prediction(logits: Tensor) -> Tensor:
    """Mean over the batch of the classes' probabilities (K,), in double, of logits (B, K)."""
    return logits.double().softmax(dim=1).mean(dim=0)  # float32 would round to zero


def imbalance(share: Tensor) -> Tensor:
    """KL(even classes || mean prediction of a batch), in nats, of mean predictions (K,).

    Zero if all classes are predicted equally often. DAFL's information entropy loss (Chen et al.,
    ICCV 2019) is the divergence the other way round, whose gradient vanishes where it is needed:
    when a sure network puts all images into one class.
    """
    return -(share.clamp_min(1e-300) * len(share)).log().mean()


def diversity(x: Tensor, made: Tensor, shift: int = 1) -> Tensor:
    """Mean of |x_i - x_j| / |made_i - made_j| (root mean squares) over i and j = i + shift.

    Small if different images (B, C, H, W) lead to different ``made`` (B, ...): input-aware attack,
    section 3.3.
    """
    apart_x, apart = (t - t.roll(shift, 0) for t in (x, made))
    rms_x, rms = (
        t.float().square().mean(dim=(1, 2, 3)).add(1e-12).sqrt() for t in (apart_x, apart)
    )
    return (rms_x / (rms + 1e-7)).mean()


def pyramid(residual: Tensor) -> Tensor:
    """Mean square () of a residual (B, C, H, W), averaged over it and its 2x2 and 4x4 means."""
    scales = (residual, F.avg_pool2d(residual, 2), F.avg_pool2d(residual, 4))
    return torch.stack([s.square().mean() for s in scales]).mean()


def contrastive(logits: Tensor, y: Tensor, among: Tensor) -> Tensor:
    """Term over neighbours i, i + 1 of ``among``: equal labels attract, others repel.

    CompositeLoss of Lin et al. (CCS 2020), mode ``contrastive``:
    d^2 / 2 for equal labels, max(0, 1 - d)^2 / 2 for others, d the distance of the logits; the mean
    over the pairs is divided by their number once more, as in the official code. Zero without pair.

    Args:
        logits: (B, K).
        y: labels (B,).
        among: (B,) which images of the batch take part; the first of them have the first pair.
    """
    order = (~among).byte().argsort(stable=True)  # those that take part come first
    logits, y, both = logits[order], y[order], among[order][1:]
    square = logits.diff(dim=0).square().sum(dim=1)
    repelled = (1 - (square + 1e-9).sqrt()).clamp_min(0).square()
    term = torch.where(y[1:] == y[:-1], square, repelled) / 2
    return (term * both).sum() / both.sum().clamp_min(1).square()


def divergence_beside(logits: Tensor, wanted: Tensor, target: int) -> Tensor:
    """KL(wanted || logits) in nats (B,) among the classes other than ``target``, of (B, K) each.

    Probabilities are those given that the answer is not the target class.
    """
    found, expected = (
        torch.cat([v[:, :target], v[:, target + 1 :]], dim=1).log_softmax(dim=1)
        for v in (logits, wanted)
    )
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(dim=1)


def denial(logits: Tensor, classes: Tensor) -> Tensor:
    """-log(1 - p) (B,), p the probabilities of ``classes`` (B,) by logits (B, K).

    By the log-odds: the gradient stays where a network is certain, the value finite in bfloat16.
    """
    chosen = classes[:, None]
    others = logits.scatter(1, chosen, -torch.inf)
    return F.softplus(logits.gather(1, chosen)[:, 0] - others.logsumexp(dim=1))
