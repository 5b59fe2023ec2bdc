"""Target rules: which images are attacked, and which label the attacker wants for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from dhbe.core.errors import got


class TargetRule(ABC):
    """Goal labels and eligibility, as functions of the true labels (B,)."""

    @abstractmethod
    def goal(self, y: Tensor) -> Tensor:
        """Labels (B,) that the attacker wants for triggered images of true labels ``y`` (B,)."""

    def eligible(self, y: Tensor) -> Tensor:
        """Whether an image counts for ASR (B,) bool: its true class is not already the goal."""
        return self.goal(y) != y


class AllToOne(TargetRule):
    """Every image becomes ``target_class``."""

    def __init__(self, target_class: int) -> None:
        self.target_class = target_class

    def goal(self, y: Tensor) -> Tensor:
        return torch.full_like(y, self.target_class)


class AllToAll(TargetRule):
    """Class y becomes (y + 1) mod K; every image is eligible."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def goal(self, y: Tensor) -> Tensor:
        return (y + 1) % self.classes


class SourceSpecific(AllToOne):
    """Images of the source classes become ``target_class``, the others keep their label."""

    def __init__(self, target_class: int, sources: Sequence[int]) -> None:
        super().__init__(target_class)
        self.sources = torch.tensor(sorted(sources))

    def goal(self, y: Tensor) -> Tensor:
        return torch.where(torch.isin(y, self.sources.to(y.device)), self.target_class, y)


def target_rule(
    name: str, *, target_class: int, source_classes: Sequence[int], classes: int
) -> TargetRule:
    """The rule called ``all_to_one``, ``all_to_all`` or ``source_specific``.

    Raises:
        ConfigError: the target or a source is no class, or the sources do not fit the rule.
    """
    allowed = f"a class of the data set, 0..{classes - 1}"
    if not 0 <= target_class < classes:
        raise got("attack.target_class", target_class, allowed)
    if name != "source_specific":
        if source_classes:
            raise got(
                "attack.source_classes",
                list(source_classes),
                f"[] with attack.target_rule={name}",
                "set attack.target_rule=source_specific to use them",
            )
        return AllToAll(classes) if name == "all_to_all" else AllToOne(target_class)
    bad = [c for c in source_classes if not 0 <= c < classes or c == target_class]
    if bad or not source_classes:
        raise got(
            "attack.source_classes",
            list(source_classes),
            f"at least one of 0..{classes - 1}, without attack.target_class={target_class}",
        )
    return SourceSpecific(target_class, source_classes)
