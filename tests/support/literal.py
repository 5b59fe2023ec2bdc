"""The game as a literal loop: what ``dhbe/game`` is compared with, in numbers and in speed.

Written from the published objectives without any of our savings: full precision, channels first,
images upsampled and then convolved, images and patches generated with a graph and detached,
gradients computed for the weights of every network that a loss passes through (and, for the
teacher, never cleared), patches padded to the size of the image and added in pixel space.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.game import ImageGenerator, Noise, TriggerNetwork
from dhbe.game.generator import UpConv


@dataclass
class LiteralGame:
    """Four players and three optimisers; ``iterate`` is one iteration of the published loop."""

    student: nn.Module
    teacher: nn.Module
    generator: nn.Module
    trigger_network: nn.Module
    mean: Tensor
    std: Tensor
    noise: Noise
    batch_size: int
    latent: int = 256
    weight_patch: float = 0.1
    weight_tv1: float = 0.0
    weight_tv2: float = 1e-4
    student_moves: int = 5

    def __post_init__(self) -> None:
        self.student.train()
        self.teacher.eval()
        self.generator.train()
        self.trigger_network.train()
        self.student_sgd = torch.optim.SGD(
            self.student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4
        )
        self.generator_adam = torch.optim.Adam(self.generator.parameters(), lr=1e-3)
        self.trigger_adam = torch.optim.Adam(self.trigger_network.parameters(), lr=1e-3)

    def patched(self, x: Tensor) -> Tensor:
        patch = self.trigger_network(self.noise.latent(self.batch_size, self.latent))
        free = x.shape[-1] - patch.shape[-1]
        left, top = map(int, self.noise.place(free))
        canvas = F.pad(patch, (left, free - left, top, free - top))
        pixels = x * self.std + self.mean
        return (pixels + canvas - self.mean) / self.std

    def iterate(self) -> dict[str, float]:
        """One iteration; returns the last student's, the generator's and the trigger's loss."""
        for _ in range(self.student_moves):
            self.student_sgd.zero_grad()
            x = self.generator(self.noise.latent(self.batch_size, self.latent)).detach()
            x_patched = self.patched(x).detach()
            t, s, s_patched = self.teacher(x), self.student(x), self.student(x_patched)
            loss_s = F.l1_loss(s, t.detach()) + self.weight_patch * F.l1_loss(s_patched, s.detach())
            loss_s.backward()
            self.student_sgd.step()

        self.generator_adam.zero_grad()
        x = self.generator(self.noise.latent(self.batch_size, self.latent))
        t, s = self.teacher(x), self.student(x)
        loss_g = -F.l1_loss(s, t)
        loss_g = loss_g + self.weight_tv1 * tv(x, lambda d: d.abs().mean())
        loss_g = loss_g + self.weight_tv2 * tv(x, lambda d: d.pow(2).sum().sqrt())
        loss_g.backward()
        self.generator_adam.step()

        self.trigger_adam.zero_grad()
        x = self.generator(self.noise.latent(self.batch_size, self.latent)).detach()
        x_patched = self.patched(x)
        loss_p = -F.l1_loss(self.student(x), self.student(x_patched))
        loss_p.backward()
        self.trigger_adam.step()
        return {
            "student": loss_s.item(),
            "generator": loss_g.item(),
            "trigger": loss_p.item(),
        }


def tv(x: Tensor, size) -> Tensor:
    """Four-direction total variation with ``size`` of each difference."""
    right = size(x[..., :, :-1] - x[..., :, 1:])
    down = size(x[..., :-1, :] - x[..., 1:, :])
    up_right = size(x[..., 1:, :-1] - x[..., :-1, 1:])
    down_right = size(x[..., :-1, :-1] - x[..., 1:, 1:])
    return right + down + up_right + down_right


def upsample_then_convolve(layer: UpConv, x: Tensor) -> Tensor:
    """What ``UpConv`` stands for, in two steps."""
    return F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, layer.bias, padding=1)


def literal_copy(
    network: nn.Module,
    generator: ImageGenerator,
    trigger_network: TriggerNetwork,
    *,
    mean: Tensor,
    std: Tensor,
    noise: Noise,
    batch_size: int,
) -> LiteralGame:
    """A literal game from copies of the same players; all weights require gradients."""
    first = torch.contiguous_format
    players = [
        copy.deepcopy(m).to(memory_format=first)
        for m in (network, network, generator, trigger_network)
    ]
    for layer in (m for p in players for m in p.modules() if isinstance(m, UpConv)):
        layer.forward = MethodType(upsample_then_convolve, layer)  # type: ignore[method-assign]
    return LiteralGame(
        *players,
        mean=mean,
        std=std,
        noise=noise,
        batch_size=batch_size,
        latent=generator.latent,
    )
