"""TSBD: zero what clean unlearning changes most, fine-tune for small gradients.

Lin et al., NeurIPS 2024, arXiv 2405.20291; official code: linweiii/TSBD, ``tsbd.py``.
"""

from __future__ import annotations

import copy
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData
from dhbe.methods.unlearning import changes, unlearn
from dhbe.models import Normalized
from dhbe.models.hooks import frozen_statistics
from dhbe.models.shortcuts import filters
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class TSBD(Defense):
    """Two stages: reinitialisation by neuron weight changes, activeness-aware fine-tuning.

    1. A copy ascends the clean cross-entropy until its accuracy is at most ``stop_accuracy``. The
       change of a neuron (a filter outside of shortcuts) is the sum of its weights' |w' - w|.
    2. Of all weights of the ``neurons`` that changed most, the ``weights`` that changed most are 0.
    3. Fine-tuning along (1 - alpha) g + alpha g', g the gradient at w and g' the one at
       w + r g / ||g||, each tensor by its own norm. It descends CE + alpha r ||g|| to first order.

    Args:
        neurons, weights: shares. The official code runs eleven values of ``neurons``.
        unlearn_schedule, schedule: of steps 1 and 3.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        stop_accuracy: Annotated[float, Ge(0), Le(1)],
        neurons: Annotated[float, Gt(0), Le(1)],
        weights: Annotated[float, Gt(0), Le(1)],
        r: Annotated[float, Ge(0)],
        alpha: Annotated[float, Ge(0), Le(1)],
        unlearn_schedule: Schedule,
        schedule: Schedule,
    ) -> None:
        self.stop_accuracy, self.neurons, self.weights = stop_accuracy, neurons, weights
        self.r, self.alpha = r, alpha
        self.unlearn_schedule, self.schedule = unlearn_schedule, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        if not filters(network):
            raise ConfigError("defense=tsbd: the network has no convolution; use defense=finetune")
        clean, forgetful = data.clean(), copy.deepcopy(network)
        unlearn(
            forgetful,
            clean,
            self.unlearn_schedule,
            runtime,
            stop_accuracy=self.stop_accuracy,
            clip=None,
        )
        zeroed = reinitialise(
            network, changes(network, forgetful), neurons=self.neurons, weights=self.weights
        )
        runtime.recorder.notes.append(f"tsbd set {zeroed} weights of convolutions to 0")

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            here = F.cross_entropy(net(batch.images), batch.labels)
            moved = ascended(net, here, self.r)
            torch.clear_autocast_cache()  # holds copies of the weights at w
            there = F.cross_entropy(frozen_statistics(net, batch.images, moved), batch.labels)
            return (1 - self.alpha) * here + self.alpha * there

        runtime.train(network, clean, self.schedule, purpose="tsbd", loss=loss)
        return network


@torch.no_grad()
def reinitialise(network: nn.Module, moved: list[Tensor], *, neurons: float, weights: float) -> int:
    """Step 2, in place; returns how many weights are zeroed.

    Args:
        moved: changes of the weights, (C_out, C_in K K) of each layer.
    """
    sums = torch.cat([layer.sum(1) for layer in moved])
    top = torch.zeros_like(sums, dtype=torch.bool)
    top[sums.argsort(descending=True, stable=True)[: max(1, int(neurons * len(sums)))]] = True
    chosen = top.split([len(layer) for layer in moved])
    merged = torch.cat([layer[own].flatten() for layer, own in zip(moved, chosen, strict=True)])
    count = max(1, int(weights * len(merged)))
    least = merged.topk(count).values[-1]
    for layer, change, own in zip(filters(network), moved, chosen, strict=True):
        out = own[:, None] & (change >= least)
        layer.weight.masked_fill_(out.view_as(layer.weight), 0)
    return int((merged >= least).sum())


def ascended(network: nn.Module, loss: Tensor, r: float) -> dict[str, Tensor]:
    """Trained weights by name, each moved by r along its normalised gradient of ``loss`` ()."""
    named = {n: w for n, w in network.named_parameters() if w.requires_grad}
    gradients = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
    return {
        name: w + r * g / (g.norm() + 1e-12)
        for (name, w), g in zip(named.items(), gradients, strict=True)
    }
