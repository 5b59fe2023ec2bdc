"""BNP: prune channels whose clean inputs are not what BatchNorm remembers (Zheng et al., 2022).

"Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022; official code:
RJ-T/NIPS2022_EP_BNP, in BackdoorBench ``defense/bnp.py``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Ge, Gt
from torch import Tensor, nn

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData
from dhbe.methods.channels import prune_by_inputs
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime


class BNP(Defense):
    """Poison is part of the running statistics, and of a clean batch it is not.

    A channel is pruned (gamma = beta = 0) if KL(N(clean batch) || N(running)) exceeds
    mean + u std of its layer. BackdoorBench's ``bnp`` compares a poisoned batch instead: it reads
    the statistics after a second pass.

    Args:
        u: 3 for CIFAR-10 and GTSRB, 4 for Tiny-ImageNet.
        images: clean images in the batch.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(self, *, u: Annotated[float, Gt(0)], images: Annotated[int, Ge(2)]) -> None:
        self.u, self.images = u, images

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        prune_by_inputs(
            network,
            data.clean(),
            divergence,
            u=self.u,
            count=self.images,
            method="bnp",
            runtime=runtime,
        )
        return network


def divergence(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """KL divergence (C,) of inputs (B, C, H, W), as normal distributions, from those remembered."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    variance = x.var(dim=(0, 2, 3)) + norm.eps
    kept = norm.running_var + norm.eps
    apart = variance + (x.mean(dim=(0, 2, 3)) - norm.running_mean).square()
    return ((kept / variance).log() + apart / kept - 1) / 2
