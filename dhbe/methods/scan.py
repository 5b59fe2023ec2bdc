"""Find the target class of a backdoor from the triggers that a network answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from annotated_types import Ge, Gt, MinLen
from torch import Tensor
from torch.nn import functional as F

from dhbe.core.types import DataSpec
from dhbe.methods.inversion import (
    CornerPatch,
    Faint,
    Kind,
    Patch,
    Search,
    Wave,
    anomaly_index,
    frequencies,
    lead,
)
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Natural:
    """Leads up to which a class stands out in networks without backdoor, by family of triggers."""

    patch: Annotated[float, Gt(0)]
    corner: Annotated[float, Gt(0)]
    faint: Annotated[float, Gt(0)]
    smooth: Annotated[float, Gt(0)]
    wave: Annotated[float, Gt(0)]


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the triggers of a family speak for.

    Attributes:
        scores: of each class (K,), its lead in units of the family's natural one: above 1 it is
            more than the networks without backdoor showed that set those.
        family: of triggers: patch, corner, faint, smooth, wave.
        kinds: of that family, for unlearning.
    """

    scores: list[float]
    family: str
    kinds: Sequence[Kind]

    @classmethod
    def of(
        cls, reached: Sequence[Tensor], family: str, kinds: Sequence[Kind], natural: float
    ) -> Evidence:
        """From the mean margins (K,) that each sought kind reaches; their leads are averaged."""
        leads = torch.stack([lead(anomaly_index(margins)) for margins in reached]).mean(dim=0)
        return cls(scores=(leads / natural).tolist(), family=family, kinds=kinds)

    @property
    def score(self) -> float:
        """Of the class that stands out most."""
        return max(self.scores)

    @property
    def target(self) -> int:
        """The class that stands out most."""
        return self.scores.index(self.score)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Seek small triggers of several families for every class.

    Small ones, because large ones move any network: a clean one had a class that patches of 5
    pixels reached as far beyond the others as a backdoor is, and none that patches of 3 did.

    Attributes:
        patches: sides of patches anywhere in the image, in pixels.
        larger: sides of patches that are unlearned beside them and not sought.
        corners: of patches in the same corner of all images.
        faint: the largest changes of a pixel by faint triggers of free pixels, of [0, 1].
        smooth: by one of a quarter of the image's side, interpolated.
        wave: amplitude of sinusoids, of [0, 1]: all up to ``periods`` per image, of one phase.
        natural: what a class's lead is measured by.
    """

    search: Search
    patches: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
    larger: list[Annotated[int, Ge(1)]]
    corners: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
    faint: Annotated[list[Annotated[float, Gt(0)]], MinLen(1)]
    smooth: Annotated[float, Gt(0)]
    wave: Annotated[float, Gt(0)]
    periods: Annotated[int, Ge(1)]
    natural: Natural

    def families(self, spec: DataSpec) -> dict[str, list[Kind]]:
        """Kinds of triggers that are sought by gradients, by family."""
        size = spec.image_size
        return {
            "patch": [Patch(side=p) for p in self.patches],
            "corner": [CornerPatch(side=c) for c in self.corners],
            "faint": [Faint(side=size, amplitude=a) for a in self.faint],
            "smooth": [Faint(side=max(1, size // 4), amplitude=self.smooth)],
        }

    def __call__(
        self, network: Normalized, x: Tensor, y: Tensor, runtime: Runtime
    ) -> list[Evidence]:
        """What each family speaks for, with images (N, C, H, W) of classes (N,)."""
        found, shown = [], []
        for family, kinds in self.families(network.spec).items():
            pairs = [self.search(network, x, y, k, network.spec.classes, runtime) for k in kinds]
            unlearned = [*kinds, *(Patch(side=p) for p in self.larger if family == "patch")]
            natural = getattr(self.natural, family)
            evidence = Evidence.of([m for _, m in pairs], family, unlearned, natural)
            found.append(evidence)
            for kind, (values, _) in zip(kinds, pairs, strict=True):
                strongest = kind.shown(values[[evidence.target]])
                shown.append(F.interpolate(strongest, x.shape[-2:]))
        runtime.recorder.picture("triggers_found", torch.cat(shown))
        return [*found, self.waves(network, x, y, runtime)]

    def waves(self, network: Normalized, x: Tensor, y: Tensor, runtime: Runtime) -> Evidence:
        """The sinusoid that moves images (N, C, H, W) most, after a trial of every one.

        Sought by gradients, other frequencies did as well, for every class.
        """
        every = Wave(amplitude=self.wave, frequencies=frequencies(self.periods))
        sine = torch.tensor([self.wave, 0.0]).view(1, 1, 2, 1).expand(1, x.shape[1], 2, 1).to(x)
        which, reached = self.search.exhaustive(
            network, x, y, every, sine, network.spec.classes, runtime
        )
        evidence = Evidence.of([reached], "wave", [], self.natural.wave)
        row, column = every.frequencies[int(which[evidence.target])]
        near = {(a, b) for a in range(row - 1, row + 2) for b in range(column - 1, column + 2)}
        kept = tuple(f for f in every.frequencies if near & {f, (-f[0], -f[1])})
        # any phase and more amplitude than the scan's, so that the true one is within reach
        return replace(evidence, kinds=[Wave(amplitude=2 * self.wave, frequencies=kept)])
