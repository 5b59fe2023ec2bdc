"""Find the target class of a backdoor from the triggers that a network answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
    """What speaks for one class.

    Attributes:
        index: see ``anomaly_index``.
        family: of triggers: patch, corner, faint, wave.
        kinds: of that family, for unlearning.
    """

    index: float
    target: int
    family: str
    kinds: Sequence[Kind]


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Seek triggers of several families for every class.

    Attributes:
        patches: sides of patches anywhere in the image, in pixels.
        corners: of patches in the same corner of all images.
        faint: the largest change of a pixel by a faint trigger of free pixels, of [0, 1].
        smooth: by one of a quarter of the image's side, interpolated.
        wave: amplitude of the sinusoids, all up to ``periods`` per image and of one phase.
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
                index, best = (v.item() for v in anomaly_index(reached).max(dim=0))
                found.append(Evidence(index=index, target=int(best), family=family, kinds=kinds))
                strongest = kind.shown(values[[int(best)]])
                shown.append(F.interpolate(strongest, x.shape[-2:]))
        runtime.recorder.picture("triggers_found", torch.cat(shown))
        return [*found, self.waves(network, x, y, runtime)]

    def waves(self, network: Normalized, x: Tensor, y: Tensor, runtime: Runtime) -> Evidence:
        """The sinusoid that moves images (N, C, H, W) most, after a trial of every one.

        Sought by gradients, other frequencies did as well, for every class.
        """
        every = Wave(amplitude=self.wave, frequencies=frequencies(self.periods))
        sine = torch.tensor([self.wave, 0.0]).view(1, 1, 2, 1).expand(1, x.shape[1], 2, 1).to(x)
        which, reached = self.search.among(
            network, x, y, every, sine, network.spec.classes, runtime
        )
        index, best = (v.item() for v in anomaly_index(reached).max(dim=0))
        row, column = every.frequencies[int(which[int(best)])]
        near = tuple((a, b) for a, b in every.frequencies if max(abs(a - row), abs(b - column)) < 2)
        kinds = [Wave(amplitude=2 * self.wave, frequencies=near)]
        return Evidence(index=index, target=int(best), family="wave", kinds=kinds)
