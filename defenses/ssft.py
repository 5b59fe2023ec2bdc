"""SSFT: suppress the critical shortcut, then fine-tune its stage (Yang et al., ICASSP 2023)."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from dhbe.data import Budget, DefenderData, TrainingBatches
from dhbe.defense import Defense
from dhbe.features import blocks, shortcut_name
from dhbe.models import Normalized
from dhbe.runtime import Runtime
from dhbe.selection import Selection, accuracy
from dhbe.training import Schedule, Supervised


class SSFT(Defense):
    """Multiply one residual block's shortcut by 0 and fine-tune the stage that contains it.

    The published choice of the block needs ASR: the largest jump (ASR(g_i) - ASR(g_{i-1})) /
    exp(ASR(g_{i-1})) while the shortcut's factor g grows from 0 to 1. It is ``selection=oracle``.
    ``validation`` needs no trigger (our adaptation): the method is run on each of the deepest
    ``candidates`` blocks, and the one with the best validation accuracy is kept. ``fixed`` takes
    ``block``.

    A suppressed identity shortcut has no weight to show it: the purified weights only mean the same
    in a network whose shortcut is removed likewise.

    Args:
        block: position of the block, negative from the end.
        candidates: blocks tried with ``selection=validation``.
    """

    needs: ClassVar[Budget] = Budget(fraction=1e-9)

    def __init__(
        self,
        *,
        selection: Selection,
        block: int,
        candidates: Annotated[int, Ge(1)],
        schedule: Schedule,
    ) -> None:
        self.selection, self.block, self.candidates = selection, block, candidates
        self.schedule = schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        found = blocks(network, method="ssft", least=1)
        if self.selection == "validation":
            tried = range(max(0, len(found) - self.candidates), len(found))
            results = {i: self.tune(network, i, data, runtime) for i in tried}
            held = data.validation()
            chosen = max(tried, key=lambda i: accuracy(results[i], held, runtime))
            repaired = results[chosen]
        else:
            oracle = self.selection == "oracle"
            chosen = critical(network, data) if oracle else self.block % len(found)
            repaired = self.tune(network, chosen, data, runtime)
        runtime.recorder.notes.append(f"ssft: shortcut of block {chosen + 1} of {len(found)}")
        return repaired

    def tune(
        self, network: Normalized, position: int, data: DefenderData, runtime: Runtime
    ) -> Normalized:
        """A copy with this block's shortcut suppressed and its stage fine-tuned."""
        network = copy.deepcopy(network)
        block = blocks(network, method="ssft", least=1)[position]
        suppress(block, 0.0)
        network.requires_grad_(False)
        for sibling in stage(network, block):
            sibling.requires_grad_(True)
        remains = getattr(block, shortcut_name(block) or "")
        if remains is not None:
            remains.requires_grad_(False)  # suppressed for good
        batches = TrainingBatches(
            data.clean(hold_out_validation=self.selection == "validation"),
            spec=network.spec,
            batch_size=self.schedule.batch_size,
            seed=runtime.derive("ssft"),
            device=runtime.device,
        )
        own = runtime.stage(f"block{position}")
        module = Supervised(network, batches, self.schedule, role="student")
        own.fit(module, batches, epochs=self.schedule.epochs)
        return network.eval()


class Gate(nn.Module):
    """A shortcut times a factor; ``inner`` is None for the identity."""

    def __init__(self, inner: nn.Module | None, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        passed: Tensor = x if self.inner is None else self.inner(x)
        return self.factor * passed


def suppress(block: nn.Module, factor: float) -> None:
    """Multiply a block's shortcut by ``factor``, in place.

    A shortcut with BatchNorm at its end carries the factor in its weights; a bare convolution, too.
    """
    name = shortcut_name(block)
    assert name is not None
    inner = getattr(block, name)
    last = None if inner is None else [*inner.modules()][-1]
    if last is None or getattr(last, "weight", None) is None:
        setattr(block, name, Gate(inner, factor))
        return
    with torch.no_grad():
        last.weight.mul_(factor)
        if last.bias is not None:
            last.bias.mul_(factor)


def stage(network: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Blocks beside ``block``, with as many channels: its stage."""
    parent = next(m for m in network.modules() if any(c is block for c in m.children()))

    def width(module: nn.Module) -> int:
        last = getattr(module, "conv2", None)
        return last.out_channels if isinstance(last, nn.Conv2d) else -1

    return [c for c in parent.children() if width(c) == width(block)]


def critical(network: Normalized, data: DefenderData) -> int:
    """The block with the largest jump of ASR over its shortcut's factor (published; an oracle)."""
    jumps = []
    for position in range(len(blocks(network, method="ssft", least=1))):
        rates = []
        for tenth in range(11):
            candidate = copy.deepcopy(network)
            suppress(blocks(candidate, method="ssft", least=1)[position], tenth / 10)
            rates.append(data.oracle(candidate)["asr"])
        jumps.append(max((b - a) / math.exp(a) for a, b in itertools.pairwise(rates)))
    return jumps.index(max(jumps))
