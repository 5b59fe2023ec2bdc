"""EP: prune channels whose inputs fall into two groups, clean and poisoned (Zheng et al., 2022).

"Pre-activation Distributions Expose Backdoor Neurons", NeurIPS 2022; official code:
RJ-T/NIPS2022_EP_BNP, in BackdoorBench ``defense/ep.py``.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData
from dhbe.methods.channels import prune_by_inputs
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime

STEP = 0.1
"""Width of a bar of the histogram, in standard deviations."""


class EP(Defense):
    """On a batch of the poisoned training set a backdoor channel has two modes: low entropy.

    A channel's largest input in each image is standardised over the batch; the channel is pruned
    (gamma = beta = 0) if the entropy of their histogram is below mean - u std of its layer.

    Args:
        u: 3 for CIFAR-10 and GTSRB, 4 for Tiny-ImageNet.
        images: of the poisoned training set, in the batch.
    """

    needs: ClassVar[Budget] = Budget(poisoned=True)

    def __init__(self, *, u: Annotated[float, Gt(0)], images: Annotated[int, Ge(2)]) -> None:
        self.u, self.images = u, images

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        prune_by_inputs(
            network,
            data.poisoned(),
            uniformity,
            u=self.u,
            count=self.images,
            method="ep",
            runtime=runtime,
        )
        return network


def uniformity(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Negative entropy (C,), in nats, of the histograms of the standardised maxima of (B, C, H, W).

    All channels share the bars, which begin at the smallest value; that value itself and a last
    bar that is not whole are left out, as in the official code.
    """
    del norm
    x = x.amax(dim=(2, 3)).T  # (C, B)
    spread = x.std(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    x = (x - x.mean(dim=1, keepdim=True)) / spread
    bars = int((x.max() - x.min()) / STEP)
    place = ((x - x.min()) / STEP).long().clamp_max(bars)
    counts = x.new_zeros(len(x), bars + 1).scatter_add_(1, place, (x > x.min()).to(x))
    entropy: Tensor = torch.special.entr(counts[:, :bars] / x.shape[1]).sum(dim=1)
    return -entropy
