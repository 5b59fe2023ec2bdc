"""ABL: anti-backdoor learning on a poisoned training set (Li et al., NeurIPS 2021, 2110.11571)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from dhbe.contracts.defense import Defense
from dhbe.core.types import Batch
from dhbe.data import Budget, DefenderData, Resident
from dhbe.models import Normalized
from dhbe.models.normalized import fresh
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.supervised import Loss


class ABL(Defense):
    """Train anew: isolate what is learnt too easily, learn the rest, unlearn the isolated.

    Isolation and unlearning see the images as they are, learning crops and mirrors them.

    1. ``isolation_schedule`` with local gradient ascent, sign(CE - gamma) CE per image, or
       flooding, |CE - gamma| + gamma; both hold the loss at gamma, and poison sinks below.
    2. The ``share`` of images with the lowest cross-entropy is isolated.
    3. ``schedule`` on the others; 4. ``unlearn_schedule`` of gradient ascent on the isolated.

    Args:
        trap: which loss step 1 uses.
    """

    needs: ClassVar[Budget] = Budget(poisoned=True)

    def __init__(
        self,
        *,
        trap: Literal["local_ascent", "flooding"],
        gamma: Annotated[float, Gt(0)],
        share: Annotated[float, Gt(0), Lt(1)],
        isolation_schedule: Schedule,
        schedule: Schedule,
        unlearn_schedule: Schedule,
    ) -> None:
        self.trap, self.gamma, self.share = trap, gamma, share
        self.isolation_schedule, self.schedule = isolation_schedule, schedule
        self.unlearn_schedule = unlearn_schedule

    def repair(self, network: Normalized, data: DefenderData, runtime: Runtime) -> Normalized:
        given = data.poisoned()
        network = fresh(network, runtime.derive("abl"), method="abl")

        plain = replace(network.spec, augmentation="none")

        def train(name: str, images: Resident, schedule: Schedule, loss: Loss) -> None:
            own, spec = runtime.stage(name), network.spec if name == "learn" else plain
            own.train(
                network, images, schedule, purpose=f"abl/{name}", role=name, spec=spec, loss=loss
            )

        def trapped(net: nn.Module, batch: Batch) -> Tensor:
            logits = net(batch.images)
            if self.trap == "flooding":
                mean = F.cross_entropy(logits, batch.labels)
                return (mean - self.gamma).abs() + self.gamma
            return local_ascent(F.cross_entropy(logits, batch.labels, reduction="none"), self.gamma)

        def learn(net: nn.Module, batch: Batch) -> Tensor:
            return F.cross_entropy(net(batch.images), batch.labels)

        def forget(net: nn.Module, batch: Batch) -> Tensor:
            return -learn(net, batch)

        train("isolate", given, self.isolation_schedule, trapped)
        logits, labels = runtime.forward(network, given), runtime.labels(given)
        each = F.cross_entropy(logits, labels, reduction="none")
        order = each.argsort()
        easy, rest = order.tensor_split([round(self.share * len(given))])
        note = isolated(each[easy], each[rest], labels[easy], network.spec.classes)
        runtime.recorder.isolate(easy, f"abl {note}, gamma {self.gamma}")
        train("learn", given.subset(rest.sort().values), self.schedule, learn)
        train("unlearn", given.subset(easy), self.unlearn_schedule, forget)
        return network


def isolated(easy: Tensor, rest: Tensor, labels: Tensor, classes: int) -> str:
    """Note on the isolated images: labels (n,), losses of ``easy`` (n,) and of the ``rest``.

    Poison has one label and sinks below gamma; images of all labels at gamma are clean.
    """
    counts = labels.bincount(minlength=classes).tolist()
    found = ", ".join(f"{n} of class {k}" for k, n in enumerate(counts) if n)
    losses = f"median loss {float(easy.median()):.3g}, of the others {float(rest.median()):.3g}"
    return f"isolated {len(labels)} images ({found}; {losses})"


def local_ascent(each: Tensor, gamma: float) -> Tensor:
    """Mean of sign(l - gamma) l over losses (B,): ascent where a loss is below gamma."""
    return ((each.detach() - gamma).sign() * each).mean()
