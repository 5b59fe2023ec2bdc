"""The contract of an attack: choose training images, stamp them, say what counts as success."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Annotated, ClassVar, Literal, TypedDict, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.data import ImageSet, Resident, to_float
from dhbe.errors import got
from dhbe.runtime import Runtime
from dhbe.targets import target_rule
from dhbe.types import CLEAN, COVER, POISON, DataSpec

Fraction = Annotated[float, Ge(0), Le(1)]


class Poisoning(TypedDict):
    """Options that all attacks have, under ``attack.``.

    poison_rate: poisoned images as a fraction of all training images.
    cover_rate: images with a trigger-like change and their true label, as a fraction likewise.
    target_class: the label the attacker wants.
    target_rule: who is attacked: everyone, everyone with the next label, or some classes.
    source_classes: the classes attacked by ``source_specific``; else empty.
    pool: whether images that already have the goal label may be poisoned (BackdoorBench does).
    """

    spec: DataSpec
    poison_rate: Fraction
    cover_rate: Fraction
    target_class: Annotated[int, Ge(0)]
    target_rule: Literal["all_to_one", "all_to_all", "source_specific"]
    source_classes: list[int]
    pool: Literal["exclude_target", "all"]


class Attack(nn.Module, ABC):
    """A backdoor attack; everything that makes it (patterns, grids, networks) is module state.

    Subclasses implement ``trigger``; the hooks below it have defaults that fit poisoning-only
    attacks. An attack that trains with the victim sets ``controls_training``.
    """

    clean_label: ClassVar[bool] = False
    """Poison keeps its label and is drawn from the target class alone."""
    controls_training: ClassVar[bool] = False
    """``batch`` and ``loss`` are called in the victim's training instead of poisoning the set."""
    active: ClassVar[bool] = True
    """False for ``attack=none``: nothing to measure but clean accuracy."""

    def __init__(self, **options: Unpack[Poisoning]) -> None:
        super().__init__()
        self.spec = options["spec"]
        self.poison_rate, self.cover_rate = options["poison_rate"], options["cover_rate"]
        self.pool = options["pool"]
        self.rule = target_rule(
            options["target_rule"],
            target_class=options["target_class"],
            source_classes=options["source_classes"],
            classes=self.spec.classes,
        )
        if self.poison_rate + self.cover_rate > 1:
            raise got(
                "attack.poison_rate + attack.cover_rate",
                self.poison_rate + self.cover_rate,
                "at most 1",
            )
        if self.spec.balanced:  # else the true shares are known once the labels are read
            self._count(torch.arange(self.spec.classes).repeat(1000))

    # ------------------------------------------------------------------ the trigger

    @abstractmethod
    def trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        """Triggered images (B, C, H, W); deterministic in evaluation mode.

        Args:
            x: images (B, C, H, W) in [0, 1].
            y: true labels (B,).
            index: positions in the data set (B,), for attacks with stored per-image noise.
        """

    @final
    def apply(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:  # type: ignore[override]
        """Triggered images, clamped to [0, 1] and rounded to multiples of 1/255.

        Raises:
            ValueError: the images have the wrong shape or are not in [0, 1].
        """
        if x.shape[1:] != self.spec.shape or len(y) != len(x) or len(index) != len(x):
            raise ValueError(
                f"images {tuple(x.shape)}, labels {tuple(y.shape)}, index {tuple(index.shape)}: "
                f"expected (B, {', '.join(map(str, self.spec.shape))}), (B,), (B,)"
            )
        out = self.trigger(x, y=y, index=index)
        assert out.shape == x.shape, f"{type(self).__name__}.trigger changed the shape"
        return out.clamp(0, 1).mul(255).round().div(255)

    # ------------------------------------------------------------------ the training set

    def _count(self, y: Tensor) -> tuple[Tensor, int, int]:
        """(eligible positions, number of poison, number of cover images) for labels (N,)."""
        if self.clean_label:
            able = (y == self.rule.goal(y)).nonzero().flatten()
        elif self.pool == "exclude_target":
            able = self.rule.eligible(y).nonzero().flatten()
        else:
            able = torch.arange(len(y))
        poison, cover = round(self.poison_rate * len(y)), round(self.cover_rate * len(y))
        if poison > len(able) and self.clean_label:
            warnings.warn(
                f"attack.poison_rate={self.poison_rate}: {poison} images, but the target class "
                f"has {len(able)}; all of them are poisoned",
                stacklevel=2,
            )
            poison = len(able)
        if poison > len(able):
            share = len(able) / len(y)
            raise got(
                "attack.poison_rate",
                self.poison_rate,
                f"at most {share:.4g}, the share of images that can be poisoned",
                "lower it, or set attack.pool=all",
            )
        return able, poison, cover

    def select(self, y: Tensor, rng: torch.Generator) -> Tensor:
        """Codes (N,) int8: 0 clean, 1 poison, 2 cover, drawn without replacement.

        Raises:
            ConfigError: more poison is asked for than there are eligible images.
        """
        able, poison, cover = self._count(y)
        codes = torch.full_like(y, CLEAN, dtype=torch.int8)
        codes[able[torch.randperm(len(able), generator=rng)[:poison]]] = POISON
        rest = (codes == CLEAN).nonzero().flatten()
        codes[rest[torch.randperm(len(rest), generator=rng)[:cover]]] = COVER
        return codes

    def relabel(self, y: Tensor, codes: Tensor) -> Tensor:
        """Training labels (N,): the goal for poison, the true label for the rest."""
        return torch.where(codes.to(y.device) == POISON, self.rule.goal(y), y)

    def stamp(self, x: Tensor, *, y: Tensor, codes: Tensor, index: Tensor) -> Tensor:
        """Training images for given codes; the default puts the trigger on all that are not clean.

        Attacks whose training images differ from their test images (perturbed, masked) override it.
        """
        stamped = self.apply(x, y=y, index=index)
        return torch.where((codes != CLEAN)[:, None, None, None], stamped, x)

    @torch.no_grad()
    def poison(self, train: ImageSet, codes: Tensor) -> ImageSet:
        """The training set as the victim's owner gets it: stamped images, given labels."""
        labels = self.relabel(train.labels, codes)
        index = codes.nonzero().flatten()
        images = train.resident().images.clone()
        for part in index.split(512):
            x = to_float(images[part])
            y, c = train.labels[part], codes[part]
            images[part] = self.stamp(x, y=y, codes=c, index=part).mul(255).round().byte()
        return Resident(images, labels)

    # ------------------------------------------------------------------ hooks of trained attacks

    def prepare(self, train: ImageSet, runtime: Runtime, surrogate: nn.Module | None) -> None:
        """Build what the trigger needs before the victim trains; idempotent."""

    def batch(self, x: Tensor, y: Tensor, code: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Compose a training batch (images, labels); only if ``controls_training``."""
        del code, index
        return x, y

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, code: Tensor) -> Tensor:
        """The victim's training loss on a batch: cross-entropy, mean over the batch."""
        del code
        return F.cross_entropy(network(x), y)
