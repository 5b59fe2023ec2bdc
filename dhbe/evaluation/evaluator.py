"""Measure a network once: predictions on the test set, clean and triggered; metrics come later."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from dhbe.contracts.attack import Attack
from dhbe.core.errors import out_of_memory
from dhbe.data import ImageSet, to_float
from dhbe.evaluation.metrics import Predictions, Truth, rates

log = logging.getLogger(__name__)
BATCH = 500
"""Images per forward pass; halved when memory runs out."""
_last: dict[tuple[object, ...], Predictions] = {}


class Evaluator:
    """Test set and trigger: the one place that knows both.

    Args:
        attack: gives trigger and target rule; None measures clean accuracy only.
    """

    def __init__(self, test: ImageSet, attack: Attack | None, *, device: torch.device) -> None:
        self.test, self.device = test, device
        self.attack = None if attack is None else attack.to(device).eval()
        labels = test.labels
        goal = labels if attack is None else attack.rule.goal(labels)
        counted = torch.zeros_like(labels, dtype=torch.bool)
        if attack is not None:
            counted = attack.rule.eligible(labels)
        self.truth = Truth(labels=labels.numpy(), goal=goal.numpy(), eligible=counted.numpy())

    @torch.inference_mode()
    def predict(self, network: nn.Module, *, limit: int | None = None) -> Predictions:
        """Classes predicted for the (first ``limit``) test images; the network is in eval mode."""
        assert not network.training, "evaluate in eval mode"
        size = BATCH
        while True:
            try:
                return self._predict(network, torch.arange(len(self.test))[:limit], size)
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
                size //= 2
                log.warning("out of memory; evaluating with batches of %d", size)

    def predict_once(self, network: nn.Module, name: tuple[object, ...]) -> Predictions:
        """As ``predict``; the last answer serves the next defense of a sweep on the same victim.

        Args:
            name: of the network and of all that rounds its outputs.
        """
        name = (*name, self.test.fingerprint())
        if name not in _last:
            found = self.predict(network)
            _last.clear()
            _last[name] = found
        return _last[name]

    def _predict(self, network: nn.Module, order: Tensor, size: int) -> Predictions:
        clean, triggered = [], []
        for raw, index in self.test.batches(order, size):
            x, index = to_float(raw.to(self.device)), index.to(self.device)
            clean.append(_classes(network, x))
            if self.attack is not None:
                y = self.test.labels[index.cpu()].to(self.device)
                triggered.append(_classes(network, self.attack.apply(x, y=y, index=index)))
        return Predictions(
            clean=torch.cat(clean).cpu().numpy(),
            triggered=torch.cat(triggered).cpu().numpy() if triggered else None,
        )

    def observer(self, limit: int = 1000) -> Callable[[nn.Module], dict[str, float]]:
        """Function that measures ACC and ASR on the first test images, for training curves."""
        part = Truth(**{k: v[:limit] for k, v in vars(self.truth).items()})

        def observe(network: nn.Module) -> dict[str, float]:
            found = rates(self.predict(network, limit=limit), part)
            values = {k: found[k] for k in ("acc", "asr")}
            return {k: r.value for k, r in values.items() if r is not None and r.value is not None}

        return observe

    @torch.inference_mode()
    def examples(self, count: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
        """(clean, triggered, positions) of the first images that count for ASR, uint8."""
        chosen = self.truth.eligible.nonzero()[0] if self.attack else np.arange(len(self.test))
        index = torch.from_numpy(chosen[:count])
        raw, _ = next(iter(self.test.batches(index, max(1, len(index)))))
        if self.attack is None:
            return raw.cpu().numpy(), None, index.numpy()
        x, y = to_float(raw.to(self.device)), self.test.labels[index].to(self.device)
        stamped = self.attack.apply(x, y=y, index=index.to(self.device))
        return raw.cpu().numpy(), stamped.mul(255).round().byte().cpu().numpy(), index.numpy()


def _classes(network: nn.Module, x: Tensor) -> Tensor:
    dtype = next(network.parameters()).dtype
    predicted: Tensor = network(x.to(dtype)).argmax(dim=1)
    return predicted
