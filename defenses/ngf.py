"""NGF: natural-gradient fine-tuning of one layer (Karim et al. 2023, arXiv 2306.17441)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from dhbe.contracts.defense import Defense
from dhbe.data import Budget, DefenderData
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier, features
from dhbe.training.runtime import Runtime


class NGF(Defense):
    """W <- W - rate (F + damping)^-1 (grad CE + anchor diag(F0) (W - W0)) for the classifier alone.

    F = E[(diag(p) - p p^T) x h h^T] is the head's Fisher matrix (bias included as a feature of 1),
    never formed: the system is solved by conjugate gradients. Features h are computed once, in eval
    mode, without augmentation. No official code exists; rate, damping and steps are ours.

    Args:
        steps: natural-gradient steps on all clean images together.
        cg_steps: of conjugate gradients per step.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        rate: Annotated[float, Gt(0)],
        damping: Annotated[float, Gt(0)],
        anchor: Annotated[float, Ge(0)],
        steps: Annotated[int, Ge(1)],
        cg_steps: Annotated[int, Ge(1)],
    ) -> None:
        self.rate, self.damping, self.anchor = rate, damping, anchor
        self.steps, self.cg_steps = steps, cg_steps

    @torch.no_grad()
    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        clean = data.clean()
        head = classifier(network)
        h, y = runtime.forward(network, clean, features).double(), runtime.labels(clean)
        w = head.weight.double()
        if head.bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
            w = torch.cat([w, head.bias.double()[:, None]], dim=1)
        start = w.clone()
        importance = fisher_diagonal((h @ w.T).softmax(1), h, y)
        for _ in range(self.steps):
            p = (h @ w.T).softmax(dim=1)
            descent = gradient(p, h, y) + self.anchor * importance * (w - start)

            def product(v: Tensor, p: Tensor = p) -> Tensor:
                return fisher_product(p, h, v) + self.damping * v

            w = w - self.rate * conjugate_gradients(product, descent, self.cg_steps)
        if head.bias is not None:
            head.bias.copy_(w[:, -1])
            w = w[:, :-1]
        head.weight.copy_(w)
        return network


def gradient(p: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """Gradient (C, F) of the mean cross-entropy for probabilities (N, C) and features (N, F)."""
    return (p - torch.nn.functional.one_hot(y, p.shape[1])).T @ h / len(h)


def fisher_product(p: Tensor, h: Tensor, v: Tensor) -> Tensor:
    """F v for v (C, F): mean over samples of (diag(p) - p p^T) v h h^T."""
    u = h @ v.T
    return (p * (u - (p * u).sum(dim=1, keepdim=True))).T @ h / len(h)


def fisher_diagonal(p: Tensor, h: Tensor, y: Tensor) -> Tensor:
    """Diagonal (C, F) of the empirical Fisher matrix, E[(grad log p(y|x))^2]."""
    error = p - torch.nn.functional.one_hot(y, p.shape[1])
    return error.square().T @ h.square() / len(h)


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Solve product(x) = b (any shape) for a symmetric positive definite product, from zero."""
    x = torch.zeros_like(b)
    residual = direction = b
    size = residual.square().sum()
    for _ in range(steps):
        image = product(direction)
        step = size / (direction * image).sum().clamp_min(1e-30)
        x, residual = x + step * direction, residual - step * image
        before, size = size, residual.square().sum()
        if size < 1e-24:
            break
        direction = residual + size / before * direction
    return x
