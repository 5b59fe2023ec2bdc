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
)
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the triggers of a kind speak for.

    Attributes:
        indices: of each class, see ``anomaly_index``.
        family: of triggers: patch, corner, faint, wave.
        kinds: of that family, for unlearning.
    """

    indices: list[float]
    family: str
    kinds: Sequence[Kind]

    @classmethod
    def of(cls, reached: Tensor, family: str, kinds: Sequence[Kind]) -> Evidence:
        """From the mean margin that is reached for each class (K,)."""
        return cls(indices=anomaly_index(reached).tolist(), family=family, kinds=kinds)

    @property
    def index(self) -> float:
        """Of the class that stands out most."""
        return max(self.indices)

    @property
    def target(self) -> int:
        """The class that stands out most."""
        return self.indices.index(self.index)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Seek triggers of several families for every class.

    Attributes:
        patches: sides of patches anywhere in the image, in pixels.
        corners: of patches in the same corner of all images.
        faint: the largest change of a pixel by a faint trigger of free pixels, of [0, 1].
        smooth: by one of a quarter of the image's side, interpolated.
        wave: amplitude of sinusoids, of [0, 1]: all up to ``periods`` per image, of one phase.
    """

    search: Search
    patches: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
    corners: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)]
    faint: Annotated[float, Gt(0)]
    smooth: Annotated[float, Gt(0)]
    wave: Annotated[float, Gt(0)]
    periods: Annotated[int, Ge(1)]

    def families(self, spec: DataSpec) -> dict[str, list[Kind]]:
        """Kinds of triggers that are sought by gradients, by family."""
        size = spec.image_size
        free = Faint(side=size, amplitude=self.faint)
        smooth = Faint(side=max(1, size // 4), amplitude=self.smooth)
        return {
            "patch": [Patch(side=p) for p in self.patches],
            "corner": [CornerPatch(side=c) for c in self.corners],
            "faint": [free, smooth],
        }

    def __call__(
        self, network: Normalized, x: Tensor, y: Tensor, runtime: Runtime
    ) -> list[Evidence]:
        """The class that each kind speaks for most, with images (N, C, H, W) of classes (N,)."""
        found, shown = [], []
        for family, kinds in self.families(network.spec).items():
            for kind in kinds:
                values, reached = self.search(network, x, y, kind, network.spec.classes, runtime)
                evidence = Evidence.of(reached, family, kinds)
                found.append(evidence)
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
        evidence = Evidence.of(reached, "wave", [])
        row, column = every.frequencies[int(which[evidence.target])]
        near = {(a, b) for a in range(row - 1, row + 2) for b in range(column - 1, column + 2)}
        kept = tuple(f for f in every.frequencies if near & {f, (-f[0], -f[1])})
        # any phase and more amplitude than the scan's, so that the true one is within reach
        return replace(evidence, kinds=[Wave(amplitude=2 * self.wave, frequencies=kept)])
