"""Infer normalisation and channel order from the network itself.

The first BatchNorm remembers the statistics of its inputs. Natural images, normalised as in
training, give the same statistics; otherwise they do not (Kullback-Leibler divergence of two
normal distributions, mean over channels: about 0.0003 against 0.01 to 5). A network without
BatchNorm is judged by the classes that it predicts for natural images of all kinds: they are many
under the normalisation that it knows, and collapse into few under another. How sure it is does not
count, because any network is surer of larger inputs.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.core.rng import generator
from dhbe.data.natural import natural_images
from dhbe.data.own import NORMALIZATIONS, statistics

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d
MOST_DIVERGENT = 0.05
"""Divergence up to which natural images are what the network was trained on."""
MARGIN, FLOOR = 3.0, 0.001
"""A rival is ruled out if its divergence is more than this multiple, plus this."""
LEAST_SPREAD, GAIN = 0.85, 0.05
"""Of a network without BatchNorm: entropy as a share of log(classes), and nats ahead."""
MATERIAL = 0.35
"""Normalisations that differ by more are not those of two data sets of natural images."""
SAME = 0.0005
"""Divergences closer than that say nothing; then the first of ``ORDERED`` is taken."""
ORDERED = (
    *("none", "half", "imagenet", "cifar10", "pytorch_cifar", "cifar100", "tiny"),
    *("mnist", "bytes"),
)
FEW = 250
"""Images that pass through a whole network."""
PIXELS = 1000 * 32 * 32
"""Looked at under each normalisation; fewer images where they are larger."""
COARSE = 5
"""Every so manieth image tells which normalisations are out of the question."""
ROUGH = 0.02
"""How far a divergence may move when all images are looked at."""
PADDING = 1 / 8
"""Of an image's side: the random crops with which CIFAR networks are trained."""


class View(NamedTuple):
    """A preprocessing candidate and its misfit (divergence, or negative entropy in nats)."""

    badness: float
    preset: str
    order: str
    cropped: bool


class Verdict(NamedTuple):
    """The inferred preprocessing, with its evidence.

    Attributes:
        preset: of ``NORMALIZATIONS``; None if it cannot be told.
        order: of the channels, ``rgb`` or ``bgr``; None likewise.
        evidence: the figures, in words.
    """

    preset: str | None
    order: str | None
    evidence: str


class _Reached(Exception):
    """Raised to stop a forward pass once the first BatchNorm has its input."""


@torch.no_grad()
def told(network: nn.Module, *, channels: int, image_size: int, classes: int) -> Verdict:
    """Normalisation and channel order that the network was trained with.

    Args:
        network: over normalised images, with its weights; put into eval mode.
    """
    count = max(32, min(1000, PIXELS // image_size**2))
    images = natural_images(channels, image_size, count)
    if images is None:
        return Verdict(None, None, f"there are no natural images of {channels} channels")
    network.eval()
    norm = first_norm(network, images[:2])
    if norm is not None and trained(norm):
        return by_statistics(network, norm, images)
    if channels == 3 and image_size <= 64:
        return by_predictions(network, images, classes)
    reason = "it has no BatchNorm" if norm is None else "its first BatchNorm was never trained"
    return Verdict(None, None, f"{reason}, and its outputs on such images would tell little")


def by_statistics(network: nn.Module, norm: BatchNorm, images: Tensor) -> Verdict:
    """Verdict from the first BatchNorm's running statistics, on images (N, C, H, W) in [0, 1]."""
    crops = random_crops(images)

    def measured(preset: str, order: str, cropped: bool, every: int) -> View:
        x = (crops if cropped else images)[::every]
        x = x.flip(1) if order == "bgr" else x
        inputs = reaching(network, norm, normalized(x, preset))
        return View(divergence(inputs, norm), preset, order, cropped)

    orders: tuple[str, ...] = ("rgb", "bgr") if images.shape[1] == 3 else ("rgb",)
    kinds = itertools.product(presets(images.shape[1]), orders, (False, True))
    views = sorted(measured(*kind, every=COARSE) for kind in kinds)
    if views[0].badness <= 2 * MOST_DIVERGENT:
        close = MARGIN * (views[0].badness + ROUGH)
        views = sorted(measured(*v[1:], every=1) if v.badness < close else v for v in views)
    best = preferred(views)
    limit = MARGIN * views[0].badness + FLOOR
    rivals = [v for v in views if v.badness <= limit]
    evidence = (
        "mean divergence between the statistics of the first BatchNorm and those of its inputs "
        f"when natural images pass: {table(views, best)}"
    )
    unlike = [v for v in rivals if apart(v.preset, best.preset, images.shape[1]) > MATERIAL]
    if views[0].badness > MOST_DIVERGENT or unlike:
        return Verdict(None, None, evidence)
    sure = all(v.order == best.order for v in rivals)
    return Verdict(best.preset, best.order if sure else None, evidence)


def by_predictions(network: nn.Module, images: Tensor, classes: int) -> Verdict:
    """Verdict from the classes predicted for images (N, C, H, W) in [0, 1]."""
    images = images[:: math.ceil(len(images) / FEW)]
    views = sorted(
        View(-entropy(network(normalized(images, preset)).argmax(1)), preset, "rgb", False)
        for preset in presets(images.shape[1])
    )
    best = views[0]
    shares = ", ".join(f"{v.preset} {-v.badness:.3f}" for v in views)
    evidence = (
        "it has no BatchNorm; entropy of the classes that it predicts for natural images, in nats "
        f"of at most {math.log(classes):.3f}: {shares}"
    )
    rivals = [v for v in views if apart(v.preset, best.preset, images.shape[1]) > MATERIAL]
    ahead = not rivals or rivals[0].badness - best.badness >= GAIN
    if not ahead or -best.badness < LEAST_SPREAD * math.log(classes):
        return Verdict(None, None, evidence)
    alike = [v.preset for v in views if v not in rivals and v.badness - best.badness < GAIN]
    return Verdict(min(alike, key=ORDERED.index), None, evidence)


@torch.no_grad()
def ruled_out(
    network: nn.Module, given: dict[str, Any], preset: str, *, channels: int, image_size: int
) -> bool:
    """Whether the first BatchNorm matches ``preset`` and excludes the ``given`` statistics.

    False where nothing can be measured.
    """
    images = natural_images(channels, image_size, max(32, min(1000, PIXELS // image_size**2)))
    norm = None if images is None else first_norm(network.eval(), images[:2])
    if images is None or norm is None or not trained(norm):
        return False
    views = (images, random_crops(images))
    known, other = (
        min(divergence(reaching(network, norm, normalized(x, kind)), norm) for x in views)
        for kind in (preset, given)
    )
    return known <= MOST_DIVERGENT and other > MARGIN * known + FLOOR


@torch.no_grad()
def strangeness(network: nn.Module, verdict: Verdict, *, channels: int, image_size: int) -> float:
    """Mean divergence over all BatchNorms under the inferred normalisation; inf if unknown.

    Tells networks apart that have the same weights but other strides or paddings.
    """
    images = natural_images(channels, image_size, max(32, min(FEW, PIXELS // image_size**2)))
    if images is None or verdict.preset is None:
        return math.inf
    found: list[float] = []

    def measure(module: BatchNorm, args: tuple[Tensor, ...]) -> None:
        found.append(divergence(args[0], module))

    norms = [m for m in network.eval().modules() if isinstance(m, BatchNorm)]
    hooks = [m.register_forward_pre_hook(measure) for m in norms]
    try:
        network(normalized(images.flip(1) if verdict.order == "bgr" else images, verdict.preset))
    finally:
        for hook in hooks:
            hook.remove()
    return sum(found) / len(found) if found else math.inf


def presets(channels: int) -> list[str]:
    """Names of normalisations that differ."""
    seen: dict[object, str] = {}
    for name in ORDERED:
        if len(NORMALIZATIONS[name][0]) in (1, channels):
            seen.setdefault(statistics(name, channels), name)
    return list(seen.values())


def preferred(views: list[View]) -> View:
    """The best view; of several as good, the one with the commonest normalisation."""
    same = [v for v in views if v.badness <= views[0].badness + SAME]
    same = [v for v in same if (v.order, v.cropped) == (views[0].order, views[0].cropped)]
    return min(same, key=lambda v: ORDERED.index(v.preset))


def apart(one: str | dict[str, Any], other: str | dict[str, Any], channels: int) -> float:
    """How much two normalisations differ: in deviations, or in log scale."""
    (mean, std), (m, s) = statistics(one, channels), statistics(other, channels)
    shifts = [abs(a - b) / d for a, b, d in zip(mean, m, s, strict=True)]
    scales = [abs(math.log(a / b)) for a, b in zip(std, s, strict=True)]
    return max(shifts + scales)


def table(views: list[View], best: View) -> str:
    """Divergences under each normalisation, in the order and crops of the best, and beyond."""
    alike = [v for v in views if (v.order, v.cropped) == (best.order, best.cropped)]
    words = [f"{v.preset} {v.badness:.2g}" for v in alike]
    text = f"{', '.join(words)} ({best.order.upper()}{', random crops' if best.cropped else ''})"
    turned = [v for v in views if v.order != best.order]
    if turned:
        text += f"; {turned[0].preset} in {turned[0].order.upper()} {turned[0].badness:.2g}"
    return text


def normalized(x: Tensor, kind: str | dict[str, Any]) -> Tensor:
    """Images (N, C, H, W) in [0, 1] as a network of that preset, or mean and std, takes them."""
    mean, std = (x.new_tensor(v).view(1, -1, 1, 1) for v in statistics(kind, x.shape[1]))
    return (x - mean) / std


def first_norm(network: nn.Module, x: Tensor) -> BatchNorm | None:
    """The first BatchNorm that images ``x`` (N, C, H, W) reach; None if they reach none."""
    reached: list[BatchNorm] = []

    def stop(module: BatchNorm, args: tuple[Tensor, ...]) -> None:
        reached.append(module)
        raise _Reached

    found = [m for m in network.modules() if isinstance(m, BatchNorm)]
    hooks = [m.register_forward_pre_hook(stop) for m in found]
    try:
        network(x)
    except _Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return reached[0] if reached else None


def trained(norm: BatchNorm) -> bool:
    """Whether a BatchNorm has statistics, and not those it starts with."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        return False
    return not bool((mean == 0).all() and (var == 1).all())


def reaching(network: nn.Module, norm: BatchNorm, x: Tensor) -> Tensor:
    """Inputs (N, C', h, w) of ``norm`` for normalised images ``x`` (N, C, H, W)."""
    inputs: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0])
        raise _Reached

    hook = norm.register_forward_pre_hook(stop)
    try:
        network(x)
    except _Reached:
        pass
    finally:
        hook.remove()
    return inputs[0]


def divergence(inputs: Tensor, norm: BatchNorm) -> float:
    """KL(inputs (N, C, H, W) || running statistics) of normal distributions, channel mean."""
    values = inputs.transpose(0, 1).flatten(1)  # (C, everything else): many times faster
    middle = values.mean(1, keepdim=True)
    mean, var = middle[:, 0].double(), (values - middle).square().mean(1).double() + norm.eps
    assert norm.running_mean is not None
    assert norm.running_var is not None
    known, spread = norm.running_mean.double(), norm.running_var.double() + norm.eps
    ratio = var / spread
    found = 0.5 * (ratio + (mean - known).square() / spread - 1 - ratio.log())
    return float(found.mean())


def entropy(classes: Tensor) -> float:
    """Entropy in nats of the distribution of the predicted classes (N,)."""
    share = classes.bincount().double() / len(classes)
    return float(torch.special.entr(share).sum())


def random_crops(images: Tensor) -> Tensor:
    """Images (N, C, H, H), each shifted by up to ``PADDING`` of its side, with black borders."""
    size = images.shape[-1]
    pad = max(1, round(size * PADDING))
    padded = F.pad(images, (pad,) * 4)
    rng = generator(0, "random crops")
    places = torch.randint(0, 2 * pad + 1, (len(images), 2), generator=rng).tolist()
    crops = [
        x[:, top : top + size, left : left + size]
        for x, (top, left) in zip(padded, places, strict=True)
    ]
    return torch.stack(crops)
