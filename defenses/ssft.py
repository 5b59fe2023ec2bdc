"""SSFT: suppress the critical shortcut, then fine-tune its stage (Yang et al., ICASSP 2023)."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Annotated, ClassVar

from annotated_types import Ge

from dhbe.contracts.defense import Defense
from dhbe.core.errors import ConfigError, got
from dhbe.data import Budget, DefenderData
from dhbe.methods.selection import Selection, accuracy
from dhbe.models import Normalized
from dhbe.models.shortcuts import (
    blocks,
    gate_is_exact,
    scalable_layer,
    scale_shortcut,
    shortcut_name,
    stage_of,
)
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule


class SSFT(Defense):
    """Multiply one residual block's shortcut by 0 and fine-tune the stage that contains it.

    The published choice of the block needs ASR: the largest jump (ASR(g_i) - ASR(g_{i-1})) /
    exp(ASR(g_{i-1})) while the shortcut's factor g grows from 0 to 1. It is ``selection=oracle``.
    ``validation`` needs no trigger (our adaptation): the method is run on each of the deepest
    ``candidates`` blocks, and the one with the best validation accuracy is kept. ``fixed`` takes
    ``block``.

    A shortcut with weights carries the factor in them. An identity shortcut has none: the purified
    weights only mean the same in a network without it, which a note and the metadata of the weights
    file say. Where only weights may change (``task=purify``) such blocks are left out.

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
        places, count = (
            self.places(network, weights_only=runtime.weights_only),
            len(blocks(network, method="ssft", least=1)),
        )
        if self.selection == "validation":
            tried = places[-self.candidates :]
            results = {i: self.tune(network, i, data, runtime) for i in tried}
            held = data.validation()
            chosen = max(tried, key=lambda i: accuracy(results[i], held, runtime))
            repaired = results[chosen]
        else:
            oracle = self.selection == "oracle"
            chosen = critical(network, places, data) if oracle else self.given(places, count)
            repaired = self.tune(network, chosen, data, runtime)
        runtime.recorder.notes.append(f"ssft: shortcut of block {chosen + 1} of {count}")
        if repaired.unwritten:
            runtime.recorder.notes.append(f"ssft: {repaired.unwritten}; no weight says so")
        return repaired

    def places(self, network: Normalized, *, weights_only: bool) -> list[int]:
        """Positions of the blocks that may be chosen.

        Raises:
            ConfigError: there are none.
        """
        found = blocks(network, method="ssft", least=1)
        allowed = [i for i, b in enumerate(found) if scalable_layer(b) is not None]
        if not weights_only:
            allowed = [i for i in range(len(found)) if i in allowed or gate_is_exact(network, i)]
        if not allowed:
            raise ConfigError(
                f"defense=ssft: no shortcut of the network's {len(found)} residual blocks has "
                "weights that could be suppressed; use dhbe, finetune, nft or anp"
            )
        return allowed

    def given(self, places: list[int], count: int) -> int:
        """``block``, counted from the first of ``count``.

        Raises:
            ConfigError: it is not among ``places``.
        """
        position = self.block + count if self.block < 0 else self.block
        if position not in places:
            kind = "" if len(places) == count else " (shortcuts that can be suppressed here)"
            allowed = f"one of {', '.join(map(str, places))}{kind}, or counted from the end"
            raise got("defense.block", self.block, allowed)
        return position

    def tune(
        self, network: Normalized, position: int, data: DefenderData, runtime: Runtime
    ) -> Normalized:
        """A copy with this block's shortcut suppressed and its stage fine-tuned."""
        network = copy.deepcopy(network)
        block = blocks(network)[position]
        if scalable_layer(block) is None:
            name = next(n for n, m in network.named_modules() if m is block)
            network.unwritten = f"{name} has no shortcut any more"
        scale_shortcut(block, 0.0)
        network.requires_grad_(False)
        for sibling in stage_of(network, block):
            sibling.requires_grad_(True)
        remains = getattr(block, shortcut_name(block) or "")
        if remains is not None:
            remains.requires_grad_(False)  # suppressed for good
        clean = data.clean(hold_out_validation=self.selection == "validation")
        own = runtime.stage(f"block{position}")
        own.train(network, clean, self.schedule, purpose="ssft")
        return network.eval()


def critical(network: Normalized, places: list[int], data: DefenderData) -> int:
    """The block of ``places`` with the largest jump of ASR over its shortcut's factor (published).

    An oracle.
    """
    jumps = []
    for position in places:
        rates = []
        for tenth in range(11):
            candidate = copy.deepcopy(network)
            scale_shortcut(blocks(candidate)[position], tenth / 10)
            rates.append(data.oracle(candidate)["asr"])
        jumps.append(max((b - a) / math.exp(a) for a, b in itertools.pairwise(rates)))
    return places[jumps.index(max(jumps))]
