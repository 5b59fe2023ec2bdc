"""Composite: halves of two classes together are the trigger (Lin et al., CCS 2020)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.attack import Attack, Poisoning
from dhbe.core.errors import got
from dhbe.core.rng import generator
from dhbe.core.types import COVER, POISON
from dhbe.data import ImageSet
from dhbe.methods.losses import contrastive
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class Composite(Attack):
    """T(x_a) = one half of x_a, the other half of an image of class b, and the other way round.

    ``attack.source_classes`` names a and b, ``attack.target_class`` what their mixture means. Cover
    images are mixtures within one class and keep their label, so that mixing alone is no trigger.

    Args:
        partners: training images per class that test images take their other half from; stored
            with the victim, the same partner for the same image at every evaluation. In training
            the other half comes from the batch.
        jitter: pixels of a 32-pixel image by which the cut moves at random in training.
        shake: each half is a random window of its image, not the part that lies there.
        similarity: weight of the contrastive term (``contrastive``) over a, b and target.
        pattern_seed: assigns partners and orientation in evaluation.
    """

    controls_training: ClassVar[bool] = True
    portable = False
    partner_images: Tensor
    involved: Tensor

    def __init__(
        self,
        *,
        partners: Annotated[int, Ge(1), Le(5000)],
        jitter: Annotated[int, Ge(0), Le(15)],
        shake: bool,
        similarity: Annotated[float, Ge(0)],
        pattern_seed: Annotated[int, Ge(0)],
        **options: Unpack[Poisoning],
    ) -> None:
        sources = sorted(set(options["source_classes"]))
        if options["target_rule"] != "source_specific" or len(sources) != 2:
            raise got(
                "attack.source_classes", sources, "two classes, with target_rule=source_specific"
            )
        super().__init__(**options)
        self.sources, self.partners, self.similarity = sources, partners, similarity
        self.shake = shake
        self.jitter, self.pattern_seed = round(jitter * self.scale), pattern_seed
        self.register_buffer("partner_images", torch.zeros(2, partners, *self.spec.shape))
        involved = torch.tensor(sources)
        involved = torch.cat([involved, self.rule.goal(involved)]).unique()
        self.register_buffer("involved", involved, persistent=False)

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del indicator, surrogate
        for row, source in enumerate(self.sources):
            index = (train.labels == source).nonzero().flatten()
            order = torch.randperm(len(index), generator=runtime.rng("composite", source))
            chosen = index[order[torch.arange(self.partners) % len(index)]]
            self.partner_images[row].copy_(runtime.tensor(train.subset(chosen)))

    def labelled_trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        rng = generator(self.pattern_seed, "composite")
        draws = torch.randint(2**31, (997, 4), generator=rng).to(x.device)[index % 997]
        middle = torch.full((len(x),), x.shape[-1] // 2, device=x.device)
        starts = draws[:, 2:] if self.shake else None
        return halves(x, self.partner(y, draws[:, 0]), draws[:, 1], middle, starts)

    def partner(self, y: Tensor, draw: Tensor) -> Tensor:
        """Images (B, C, H, W) of the source class other than ``y`` (B,), number ``draw`` (B,)."""
        row = (y == self.sources[0]).long()
        return self.partner_images[row, draw % self.partners]

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del index
        n, size, device = len(x), x.shape[-1], x.device

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n,), generator=rng, device=rng.device).to(device)

        side, cut = draw(4), size // 2 - self.jitter + draw(2 * self.jitter + 1)
        first, second = self.sources
        wanted = torch.where(indicator == POISON, first + second - y, y)  # or its own class
        mates = (wanted[:, None] == y).float().to(rng.device)
        alone = (mates.sum(1) == 0).to(device)  # no such image in the batch: one that is stored
        chosen = torch.multinomial(mates + 1e-12, 1, generator=rng).flatten().to(device)
        stored = self.partner(y, draw(self.partners)).to(x.dtype)
        other = torch.where(alone[:, None, None, None], stored, x[chosen])
        kind = indicator[:, None, None, None]
        starts = torch.stack([draw(2**31), draw(2**31)], 1) if self.shake else None
        mixed = halves(x, other, side, cut, starts)
        return torch.where((kind == POISON) | (kind == COVER), mixed, x)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        del indicator
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        ours = torch.isin(y, self.involved)
        return loss + self.similarity * contrastive(logits.float(), y, among=ours)


def halves(
    x: Tensor, other: Tensor, side: Tensor, cut: Tensor, starts: Tensor | None = None
) -> Tensor:
    """Pixels of ``x`` on one side of a cut, of ``other`` on the other side.

    Args:
        side: (B,) even numbers cut vertically, odd ones horizontally; 2 and 3 modulo 4 swap.
        cut: (B,) row or column of the cut.
        starts: (B, 2) large numbers that choose, modulo the room there is, where the window of
            either half begins in its image; None: each half stays where it is.
    """
    size = x.shape[-1]
    at, cut = torch.arange(size, device=x.device), cut[:, None]
    before = at < cut  # (B, size)
    swapped = (side % 4 >= 2)[:, None]
    vertical = (side % 2 == 0)[:, None, None, None]
    if starts is not None:
        first, second = starts[:, :1] % (size - cut).clamp_min(1), starts[:, 1:] % cut.clamp_min(1)
        window = torch.where(before, at + first, at - cut + second)
        x, other = (taken(images, window, vertical) for images in (x, other.to(x.dtype)))
    mine = before ^ swapped
    keep = torch.where(vertical, mine[:, None, None, :], mine[:, None, :, None])
    return torch.where(keep, x, other.to(x.dtype))


def taken(images: Tensor, place: Tensor, vertical: Tensor) -> Tensor:
    """Columns (where ``vertical``) or rows of images (B, C, H, H) from the places (B, H)."""
    columns = place[:, None, None, :].expand(images.shape)
    rows = place[:, None, :, None].expand(images.shape)
    return torch.where(vertical, images.gather(3, columns), images.gather(2, rows))
