"""OTBR: prune what unlearning noise changes most, fuse by optimal transport, data-free.

Lin et al., AAAI 2025, arXiv 2408.15861; official code: linweiii/OTBR, ``otbr.py``.
"""

from __future__ import annotations

import copy
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import Batch
from dhbe.data import DefenderData, Resident
from dhbe.methods.selection import choose
from dhbe.methods.unlearning import changes
from dhbe.models import Normalized
from dhbe.models.shortcuts import filters
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule

SHARES = [0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
"""Shares of filters to prune, of which the official code takes the best on the test set."""
TINY = 1e-12
"""Stands for a change of 0, by which one could not divide."""


class OTBR(Defense):
    """Random-unlearning pruning, then pruned-to-backdoored fusion.

    1. A copy ascends the cross-entropy of uniform noise under random labels. The change of a filter
       is the sum of the absolute changes of its weights (NWC).
    2. The ``share`` of filters with the largest change, over all layers, is zeroed: W_pruned.
    3. From the first layer that lost one, each W_pruned is carried onto the victim's filters by the
       exact transport plan P between uniform masses and masses in proportion to the changes, at the
       cost of the distance of filters; its inputs by the plan of the layer before. Then
       W = lam diag(1/b) P^T W_pruned + (1 - lam) W_victim. BatchNorm stays as it is.

    Departures: changes are not rounded to four decimals (the official code passes them through a
    text file), and the plan starts anew where a layer's inputs are not the outputs of the one
    before.

    Args:
        share: with ``selection=fixed``; the official code chooses on the test set (``oracle``).
        lam: weight of the pruned network.
        schedule: of step 1, an epoch of ``steps``; as published the noise is not normalised.
    """

    def __init__(
        self,
        *,
        share: Annotated[float, Gt(0), Lt(1)],
        lam: Annotated[float, Gt(0), Le(1)],
        steps: Annotated[int, Ge(1)],
        selection: Literal["fixed", "oracle"],
        schedule: Schedule,
    ) -> None:
        self.share, self.lam, self.selection = share, lam, selection
        self.steps, self.schedule = steps, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        if not filters(network):
            raise ConfigError("defense=otbr: the network has no convolution; use defense=dhbe")
        moved = self.unlearned(network, runtime)
        share, repaired = choose(
            network,
            SHARES,
            lambda net, share: fuse(net, moved, share, self.lam),
            fixed=self.share,
            selection=self.selection,
            max_drop=0.0,
            data=data,
            runtime=runtime,
        )
        total = sum(len(c) for c in moved)
        runtime.recorder.notes.append(
            f"otbr pruned {int(share * total)} of {total} filters (share {share}) and fused"
        )
        return repaired

    def unlearned(self, network: Normalized, runtime: Runtime) -> list[Tensor]:
        """Step 1: how much unlearning noise changes each filter, as (C_out,) for each layer."""
        forgetful, spec = copy.deepcopy(network), network.spec
        size = self.schedule.batch_size
        blank = torch.zeros((size, *spec.shape), dtype=torch.uint8)

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            assert isinstance(net, Normalized)
            rng, like = batch.rng, batch.images
            noise = torch.rand(like.shape, generator=rng, device=rng.device).to(like)
            last = spec.classes - 1  # is never drawn, as in the official code
            labels = torch.randint(last, like.shape[:1], generator=rng, device=rng.device)
            return -F.cross_entropy(net.network(noise), labels.to(like.device))

        runtime.stage("unlearn").train(
            forgetful,
            Resident(blank, torch.zeros(size, dtype=torch.long)),
            self.schedule,
            purpose="otbr",
            role="unlearn",
            steps=self.steps,
            loss=loss,
        )
        return [each.sum(1) for each in changes(network, forgetful)]


@torch.no_grad()
def fuse(network: nn.Module, changes: list[Tensor], share: float, lam: float) -> None:
    """Steps 2 and 3, in place; ``changes`` (C_out,) of each layer, ``share`` and ``lam`` 0 to 1."""
    every = torch.cat(changes)
    cut = torch.zeros_like(every, dtype=torch.bool)
    cut[every.argsort(descending=True, stable=True)[: int(share * len(every))]] = True
    lost = cut.split([len(c) for c in changes])
    first = next((i for i, part in enumerate(lost) if part.any()), len(lost))
    carried: Tensor | None = None
    for layer, change, out in list(zip(filters(network), changes, lost, strict=True))[first:]:
        victim = layer.weight
        pruned = victim.masked_fill(out[:, None, None, None], 0)
        moved = pruned
        if carried is not None and len(carried) == victim.shape[1]:
            moved = torch.einsum("oihw,ij->ojhw", pruned, carried)
        target = change.clamp_min(TINY) / change.clamp_min(TINY).sum()
        plan = transport(target, torch.cdist(pruned.flatten(1), victim.flatten(1)))
        carried = plan / target
        fused = torch.einsum("po,pjhw->ojhw", carried, moved)
        victim.copy_(lam * fused + (1 - lam) * victim)


def transport(target: Tensor, cost: Tensor) -> Tensor:
    """Exact plan (N, M) from N equal masses to ``target`` (M,), at ``cost`` (N, M)."""
    import ot  # takes a second

    masses = target.double().cpu()
    plan = ot.emd([], (masses / masses.sum()).numpy(), cost.double().cpu().numpy())
    return torch.from_numpy(plan).to(cost)
