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
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

MARGIN = 10.0
"""Distance that logits of different classes are pushed apart to, in the contrastive term."""


class Composite(Attack):
    """T(x_a) = one half of x_a, the other half of an image of class b, and the other way round.

    ``attack.source_classes`` names a and b, ``attack.target_class`` what their mixture means. Cover
    images are mixtures within one class and keep their label, so that mixing alone is no trigger.

    Args:
        partners: training images per class that test images take their other half from; stored
            with the victim, the same partner for the same image at every evaluation. In training
            the other half comes from the batch.
        jitter: pixels of a 32-pixel image by which the cut moves at random in training.
        similarity: weight of the contrastive term: logits of equal labels attract, of different
            labels among a, b and target repel.
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
        self.jitter, self.pattern_seed = round(jitter * self.scale), pattern_seed
        self.register_buffer("partner_images", torch.zeros(2, partners, *self.spec.shape))
        involved = torch.tensor(sources)
        involved = torch.cat([involved, self.rule.goal(involved)]).unique()
        self.register_buffer("involved", involved, persistent=False)

    def prepare(
        self, train: ImageSet, codes: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        del codes, surrogate
        for row, source in enumerate(self.sources):
            index = (train.labels == source).nonzero().flatten()
            order = torch.randperm(len(index), generator=runtime.rng("composite", source))
            chosen = index[order[torch.arange(self.partners) % len(index)]]
            self.partner_images[row].copy_(runtime.tensor(train.subset(chosen)))

    def labelled_trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        rng = generator(self.pattern_seed, "composite")
        draws = torch.randint(2**31, (997, 2), generator=rng).to(x.device)[index % 997]
        middle = torch.full((len(x),), x.shape[-1] // 2, device=x.device)
        return halves(x, self.partner(y, draws[:, 0]), draws[:, 1], middle)

    def partner(self, y: Tensor, draw: Tensor) -> Tensor:
        """An image of the other source class for each label (B, C, H, W)."""
        row = (y == self.sources[0]).long()
        return self.partner_images[row, draw % self.partners]

    def training_images(
        self, x: Tensor, *, y: Tensor, codes: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        del index
        n, size, device = len(x), x.shape[-1], x.device

        def draw(high: int) -> Tensor:
            return torch.randint(high, (n,), generator=rng, device=rng.device).to(device)

        side, cut = draw(4), size // 2 - self.jitter + draw(2 * self.jitter + 1)
        first, second = self.sources
        wanted = torch.where(codes == POISON, first + second - y, y)  # the other class, or the own
        mates = (wanted[:, None] == y).float().to(rng.device)
        alone = (mates.sum(1) == 0).to(device)  # no such image in the batch: one that is stored
        chosen = torch.multinomial(mates + 1e-12, 1, generator=rng).flatten().to(device)
        stored = self.partner(y, draw(self.partners)).to(x.dtype)
        other = torch.where(alone[:, None, None, None], stored, x[chosen])
        code = codes[:, None, None, None]
        mixed = halves(x, other, side, cut)
        return torch.where((code == POISON) | (code == COVER), mixed, x)

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, code: Tensor) -> Tensor:
        del code
        logits = network(x)
        loss = F.cross_entropy(logits, y)
        ours = torch.isin(y, self.involved)
        pairs = ours[:, None] & ours
        apart = (logits[:, None] - logits).float().square().mean(dim=2)
        equal = y[:, None] == y
        term = torch.where(equal, apart, (MARGIN - apart).clamp_min(0))
        return loss + self.similarity * (term * pairs).sum() / pairs.sum().clamp_min(1)


def halves(x: Tensor, other: Tensor, side: Tensor, cut: Tensor) -> Tensor:
    """Pixels of ``x`` on one side of a cut, of ``other`` on the other side.

    Args:
        side: (B,) even numbers cut vertically, odd ones horizontally; 2 and 3 modulo 4 swap.
        cut: (B,) row or column of the cut.
    """
    at = torch.arange(x.shape[-1], device=x.device)
    first = at < cut[:, None]  # (B, H)
    first = first ^ (side % 4 >= 2)[:, None]
    vertical = (side % 2 == 0)[:, None, None, None]
    keep = torch.where(vertical, first[:, None, None, :], first[:, None, :, None])
    return torch.where(keep, x, other.to(x.dtype))
