"""FIP and Fast-FIP: Fisher-information-guided purification (Karim et al., CCS 2024, 2409.00863)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, ImageSet
from dhbe.models import Normalized
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class FIP(Defense):
    """L = CE + trace_weight Tr F(theta) + (anchor_weight / 2) sum diag(F0) (theta - theta0)^2.

    F = E[grad log p(y|x) grad log p(y|x)^T] is the empirical Fisher matrix, F0 and theta0 belong to
    the suspect. A small trace means a flat minimum, which a backdoored network is not in. The
    released code adds a random first-order term of zero mean instead; this is the paper's form.

    Args:
        spectral: Fast-FIP: train only shifts of the singular values of convolutions and linear
            layers, W = U diag(ReLU(sigma + shift)) V^T.
        trace_every: steps between two that include the trace.
        steps: batches per epoch, drawn with replacement.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        trace_weight: Annotated[float, Ge(0)],
        anchor_weight: Annotated[float, Ge(0)],
        spectral: bool,
        trace_every: Annotated[int, Ge(1)],
        steps: Annotated[int, Ge(1)],
        schedule: Schedule,
    ) -> None:
        self.trace_weight, self.anchor_weight = trace_weight, anchor_weight
        self.spectral, self.trace_every = spectral, trace_every
        self.steps, self.schedule = steps, schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        if self.spectral:
            network.requires_grad_(False)
            for layer in layers:
                parametrize.register_parametrization(layer, "weight", Spectrum(layer.weight))
        clean = data.clean()
        weights = [p for p in network.parameters() if p.requires_grad]
        start = [w.detach().clone() for w in weights]
        fisher = self.fisher_diagonal(network, weights, clean, runtime)

        def loss(net: nn.Module, batch: Batch) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no second derivative
                logits = net(batch.images)
            each = F.cross_entropy(logits, batch.labels, reduction="none")
            total = each.mean()
            if self.trace_weight and round(batch.progress * self.steps) % self.trace_every == 0:
                total = total + self.trace_weight * fisher_trace(each, weights, batch.rng)
            if self.anchor_weight:
                pulls = [
                    (f * (w - w0).square()).sum()
                    for f, w, w0 in zip(fisher, weights, start, strict=True)
                ]
                total = total + self.anchor_weight / 2 * torch.stack(pulls).sum()
            return total

        runtime.train(network, clean, self.schedule, purpose="fip", steps=self.steps, loss=loss)
        if self.spectral:
            for layer in layers:
                parametrize.remove_parametrizations(layer, "weight")
        return network

    def fisher_diagonal(
        self,
        network: Normalized,
        weights: Sequence[Tensor],
        images: ImageSet,
        runtime: Runtime,
    ) -> list[Tensor]:
        """Diagonal of F at the suspect, in the weights' shapes: one backward pass per batch."""
        rng = runtime.rng("fip diagonal", device=runtime.device)
        total = [torch.zeros_like(w) for w in weights]
        seen = 0
        batches = runtime.batches(
            images,
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            purpose="fip",
            steps=self.steps,
        )
        for batch in batches:
            each = F.cross_entropy(network(batch.images), batch.labels, reduction="none")
            gradients = torch.autograd.grad((signs(each, rng) * each).sum(), list(weights))
            total = [t + g.square() for t, g in zip(total, gradients, strict=True)]
            seen += len(each)
            if seen >= 10 * len(images):
                break
        return [t / seen for t in total]


def signs(each: Tensor, rng: torch.Generator) -> Tensor:
    """Random signs (B,), +1 or -1 with equal probability, for the losses (B,)."""
    return 2 * torch.randint(2, each.shape, generator=rng, device=each.device).to(each.dtype) - 1


def fisher_trace(each: Tensor, weights: Sequence[Tensor], rng: torch.Generator) -> Tensor:
    """Unbiased estimate of Tr F = mean_i |grad l_i|^2, with a graph for its own gradient.

    With random signs r, E |grad sum_i r_i l_i|^2 = sum_i |grad l_i|^2: the cross terms vanish.

    Args:
        each: losses -log p(y_i|x_i) (B,).
    """
    mixed = (signs(each, rng) * each).sum()
    gradients = torch.autograd.grad(mixed, list(weights), create_graph=True)
    return torch.stack([g.square().sum() for g in gradients]).sum() / len(each)


class Spectrum(nn.Module):
    """Parametrization W -> U diag(ReLU(sigma + shift)) V^T of a weight seen as (C_out, rest)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        for name, value in (("left", u), ("values", s), ("right", v)):
            self.register_buffer(name, value)
        self.shift = nn.Parameter(torch.zeros_like(s))

    def forward(self, weight: Tensor) -> Tensor:
        rebuilt = (self.left * (self.values + self.shift).relu()) @ self.right
        return rebuilt.view(weight.shape)
