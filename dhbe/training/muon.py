"""Muon (Jordan 2024): momentum whose update of each filter bank is made orthogonal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from dhbe.core.errors import got
from dhbe.training.schedule import Schedule

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of the Newton-Schulz step (source: cifar10-airbench, ``airbench94_muon.py``)."""


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """About U V^T of a matrix U S V^T (M, N), singular values in 0.5 to 1.5, by Newton-Schulz."""
    a, b, c = QUINTIC
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    found: Tensor = x.T if wide is not matrix else x
    return found


class Muon(torch.optim.Optimizer):
    """Groups with ``steps`` take orthogonal steps in filters of fixed norm, the others SGD's.

    All with Nesterov's momentum. ``torch.optim.Muon`` takes matrices alone and keeps no norm.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every group."""
        del closure
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, group)

    def _move(self, weight: Tensor, group: dict[str, Any]) -> None:
        gradient = weight.grad + group["weight_decay"] * weight
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        kept = state["momentum_buffer"]
        kept.mul_(group["momentum"]).add_(gradient)
        step = gradient.add(kept, alpha=group["momentum"])
        if group["steps"]:
            weight.mul_(len(weight) ** 0.5 / weight.norm())
            step = orthogonal(step.flatten(1), group["steps"]).view_as(weight)
        weight.sub_(step, alpha=group["lr"])


@dataclass(kw_only=True)
class MuonSchedule(Schedule):
    """A training with Muon for filters and SGD for all else, as cifar10-airbench does it.

    ``learning_rate``, ``momentum``, ``newton_schulz`` (steps) are those of filters. The other rates
    and ``weight_decay`` (of all but filters) are for a loss summed over a batch, as published.
    """

    momentum: Annotated[float, Ge(0), Le(1)]
    newton_schulz: Annotated[int, Ge(1)]
    bias_rate: Annotated[float, Gt(0)]
    head_rate: Annotated[float, Gt(0)]
    other_momentum: Annotated[float, Ge(0), Le(1)]

    def optimizer(self, network: nn.Module) -> Muon:
        """Muon over all parameters that require a gradient.

        Raises:
            ConfigError: one is neither a bias, nor of a linear layer, nor of a 2D convolution.
        """
        learning = [p for p in network.parameters() if p.requires_grad]
        if other := sorted({p.ndim for p in learning} - {1, 2, 4}):
            allowed = "linear layers, 2D convolutions and biases, as model=airbench has"
            raise got("model", f"weights of {other} dimensions", allowed, "choose another victim=")
        by_rank = {r: [p for p in learning if p.ndim == r] for r in (1, 2, 4)}
        rates = {1: self.bias_rate, 2: self.head_rate}
        others = [
            {
                "params": by_rank[rank],
                "lr": rate * self.batch_size,
                "momentum": self.other_momentum,
                "weight_decay": self.weight_decay / rate,
                "steps": 0,
            }
            for rank, rate in rates.items()
        ]
        filters = {
            "params": by_rank[4],
            "lr": self.learning_rate,
            "momentum": self.momentum,
            "weight_decay": 0.0,
            "steps": self.newton_schulz,
        }
        return Muon([g for g in (filters, *others) if g["params"]], {})
