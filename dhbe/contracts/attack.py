"""The contract of an attack: choose training images, poison them, say what counts as success."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, TypedDict, final

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Unpack

from dhbe.contracts.targets import target_rule
from dhbe.core.errors import got
from dhbe.core.rng import generator
from dhbe.core.types import CLEAN, COVER, POISON, Augmentation, DataSpec
from dhbe.data import ImageSet, Resident, to_float
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Player

Fraction = Annotated[float, Ge(0), Le(1)]
REFERENCE_SIZE = 32
"""Image size, in pixels, that sizes and positions in attack configs refer to."""


class Poisoning(TypedDict):
    """Options that all attacks have, under ``attack.``.

    Attributes:
        poison_rate: poisoned images as a fraction of the victim's training images.
        poison_count: number of poisoned images, for protocols that give one; 0: use the rate.
        cover_rate: fraction of images with a trigger-like change and their true label.
        target_class: the label the attacker wants.
        target_rule: who is attacked: everyone, everyone with the next label, or some classes.
        source_classes: the classes attacked by ``source_specific``; else empty.
        pool: whether images that already have the goal label may be poisoned (BackdoorBench does).
        augmentation: of the victim's training; it is part of an attack's recipe.
    """

    spec: DataSpec
    poison_rate: Fraction
    poison_count: Annotated[int, Ge(0)]
    cover_rate: Fraction
    target_class: Annotated[int, Ge(0)]
    target_rule: Literal["all_to_one", "all_to_all", "source_specific"]
    source_classes: list[int]
    pool: Literal["exclude_target", "all"]
    augmentation: Augmentation


class Attack(nn.Module):
    """A backdoor attack; everything that makes it (patterns, grids, networks) is module state.

    Subclasses implement ``trigger`` (or ``labelled_trigger``, if labels or positions matter); the
    other hooks have defaults that fit poisoning-only attacks.
    """

    clean_label: bool = False
    """Poison keeps its label and is drawn from the target class alone."""
    controls_training: ClassVar[bool] = False
    """The attacker trains the victim: each batch is composed anew instead of the set once."""
    needs_surrogate: ClassVar[bool] = False
    """``prepare`` gets a clean network: same data, architecture and schedule, no attack."""
    portable: bool = True
    """The options alone tell the trigger; else it is made together with a victim."""
    active: ClassVar[bool] = True
    """False for ``attack=none``: nothing to measure but clean accuracy."""

    def __init__(self, **options: Unpack[Poisoning]) -> None:
        super().__init__()
        self.spec = options["spec"]
        self.poison_rate, self.cover_rate = options["poison_rate"], options["cover_rate"]
        self.poison_count = options["poison_count"]
        self.pool, self.augmentation = options["pool"], options["augmentation"]
        self.rule = target_rule(
            options["target_rule"],
            target_class=options["target_class"],
            source_classes=options["source_classes"],
            classes=self.spec.classes,
        )
        self.scale = self.spec.image_size / REFERENCE_SIZE
        if self.poison_rate + self.cover_rate > 1:
            raise got(
                "attack.poison_rate + attack.cover_rate",
                self.poison_rate + self.cover_rate,
                "at most 1",
            )
        if self.poison_count and self.controls_training:
            raise got(
                "attack.poison_count",
                self.poison_count,
                "0 where the attacker composes every batch anew",
                "set attack.poison_rate",
            )
        if (
            self.spec.balanced and not self.poison_count
        ):  # else the true shares are known once the labels are read
            self._count(torch.arange(self.spec.classes).repeat(1000))

    # ------------------------------------------------------------------ the trigger

    def trigger(self, x: Tensor) -> Tensor:
        """Triggered images, of images (B, C, H, W) in [0, 1]; deterministic in evaluation mode."""
        raise NotImplementedError(f"{type(self).__name__} needs labels for its trigger")

    def labelled_trigger(self, x: Tensor, *, y: Tensor, index: Tensor) -> Tensor:
        """The same for attacks whose trigger depends on more than the image.

        Args:
            y: true labels (B,).
            index: positions in the data set (B,).
        """
        del y, index
        return self.trigger(x)

    def __init_subclass__(cls) -> None:
        """Refuse, as an abstract method would, a class without any trigger."""
        super().__init_subclass__()
        if cls.trigger is Attack.trigger and cls.labelled_trigger is Attack.labelled_trigger:
            raise TypeError(f"{cls.__name__} implements neither trigger nor labelled_trigger")

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
        out = self.labelled_trigger(x, y=y, index=index)
        assert out.shape == x.shape, f"{type(self).__name__}.trigger changed the shape"
        return quantize(out)

    # ------------------------------------------------------------------ the training set

    def _count(self, y: Tensor, *, part: bool = False) -> tuple[Tensor, int, int]:
        """(eligible positions, number of poison, number of cover images) for labels (N,).

        Args:
            part: a batch; by chance it may hold fewer eligible images than wanted.
        """
        if self.clean_label:
            able = (y == self.rule.goal(y)).nonzero().flatten()
        elif self.pool == "exclude_target":
            able = self.rule.eligible(y).nonzero().flatten()
        else:
            able = torch.arange(len(y), device=y.device)
        poison = self.poison_count or round(self.poison_rate * len(y))
        cover = round(self.cover_rate * len(y))
        if part:
            return able, min(poison, len(able)), cover
        if poison > len(able) and self.clean_label:
            warnings.warn(
                f"attack.poison_rate={self.poison_rate}: {poison} images, but the target class "
                f"has {len(able)}; all of them are poisoned",
                stacklevel=2,
            )
            poison = len(able)
        if poison > len(able):
            share = len(able) / len(y)
            if self.poison_count:
                raise got(
                    "attack.poison_count",
                    self.poison_count,
                    f"at most {len(able)}, the number of images that can be poisoned",
                )
            raise got(
                "attack.poison_rate",
                self.poison_rate,
                f"at most {share:.4g}, the share of images that can be poisoned",
                "lower it, or set attack.pool=all",
            )
        return able, poison, cover

    def select(self, y: Tensor, rng: torch.Generator, *, part: bool = False) -> Tensor:
        """Codes (N,) int8: 0 clean, 1 poison, 2 cover, drawn without replacement.

        Args:
            part: ``y`` is a batch, not the training set.

        Raises:
            ConfigError: more poison is asked for than there are eligible images.
        """
        able, poison, cover = self._count(y, part=part)
        indicator = torch.full_like(y, CLEAN, dtype=torch.int8)

        def draw(positions: Tensor, count: int) -> Tensor:
            order = torch.randperm(len(positions), generator=rng, device=rng.device)
            return positions[order[:count].to(positions.device)]

        indicator[draw(able, poison)] = POISON
        free = (indicator == CLEAN) & self.coverable(y)
        indicator[draw(free.nonzero().flatten(), cover)] = COVER
        return indicator

    def coverable(self, y: Tensor) -> Tensor:
        """Whether an image of these labels (B,) may become a cover image (B,) bool."""
        return torch.ones_like(y, dtype=torch.bool)

    def relabel(self, y: Tensor, indicator: Tensor) -> Tensor:
        """Training labels (N,): the goal for poison, the true label for the rest."""
        return torch.where(indicator.to(y.device) == POISON, self.rule.goal(y), y)

    def training_images(
        self, x: Tensor, *, y: Tensor, indicator: Tensor, index: Tensor, rng: torch.Generator
    ) -> Tensor:
        """Training images (B, C, H, W); the default puts the trigger on all that are not clean.

        Attacks whose training images differ from their test images (perturbed, masked) override it.

        Args:
            x: images (B, C, H, W) in [0, 1]; the result has the same shape and range.
            y: true labels (B,).
            indicator: CLEAN (0), POISON (1) or COVER (2), for each image (B,).
            index: positions in the data set (B,).
        """
        del rng
        triggered = self.apply(x, y=y, index=index)
        return torch.where((indicator != CLEAN)[:, None, None, None], triggered, x)

    @torch.no_grad()
    def poison(self, train: ImageSet, indicator: Tensor, *, seed: int) -> ImageSet:
        """The training set poisoned as ``indicator`` (N,) says, with the attacker's labels.

        For an attacker who controls training it is a snapshot: what one epoch looks like.
        """
        labels = self.relabel(train.labels, indicator)
        index = indicator.nonzero().flatten()
        images = train.resident().images.clone()
        rng = generator(seed, "stamp")
        state = next(itertools.chain(self.buffers(), self.parameters()), labels)
        for part in index.split(512):  # where the trigger is: patterns or networks
            x, y, c, i = (
                t.to(state.device)
                for t in (images[part], train.labels[part], indicator[part], part)
            )
            made = self.training_images(to_float(x), y=y, indicator=c, index=i, rng=rng)
            images[part] = made.mul(255).round().byte().to(images.device)
        return Resident(images, labels)

    # ------------------------------------------------------------------ hooks of trained attacks

    def prepare(
        self, train: ImageSet, indicator: Tensor, runtime: Runtime, surrogate: Normalized | None
    ) -> None:
        """Build what the trigger needs before the victim trains; idempotent.

        Args:
            indicator: which images will be poisoned (N,).
            surrogate: frozen, in eval mode; given if ``needs_surrogate``.
        """

    @torch.no_grad()
    def compose(
        self, x: Tensor, y: Tensor, index: Tensor, rng: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A training batch before augmentation, for attacks with ``controls_training``.

        Args:
            x: clean images (B, C, H, W) in [0, 1].
            y: true labels (B,).
            index: positions in the data set (B,).

        Returns:
            images (B, C, H, W), labels (B,) and poison indicator (B,).
        """
        indicator = self.select(y, rng, part=True)
        return (
            self.training_images(x, y=y, indicator=indicator, index=index, rng=rng),
            self.relabel(y, indicator),
            indicator,
        )

    def players(self) -> Sequence[Player]:
        """Own networks that learn together with the victim; their gradients come from ``loss``."""
        return ()

    def begin_epoch(self, progress: float) -> None:
        """Called before each epoch with the fraction of the victim's budget that is spent."""

    def loss(self, network: nn.Module, x: Tensor, y: Tensor, indicator: Tensor) -> Tensor:
        """Mean cross-entropy () on images (B, C, H, W) with labels and poison indicator (B,)."""
        del indicator
        return F.cross_entropy(network(x), y)


def quantize(x: Tensor) -> Tensor:
    """Clamp images (B, C, H, W) to [0, 1] and round to multiples of 1/255, as image files do."""
    return x.clamp(0, 1).mul(255).round().div(255)


class NoAttack(Attack):
    """Clean training, the reference for every accuracy drop; poisoning options have no effect."""

    active = False

    def trigger(self, x: Tensor) -> Tensor:
        return x

    def select(self, y: Tensor, rng: torch.Generator, *, part: bool = False) -> Tensor:
        del rng, part
        return torch.full_like(y, CLEAN, dtype=torch.int8)
