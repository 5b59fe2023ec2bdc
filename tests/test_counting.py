"""Work: counts by hand, samples that stand for the whole, and trainings that notice nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import flops
from dhbe.core.types import Batch
from dhbe.data import Resident, TrainingBatches
from dhbe.game import SeededNoise
from dhbe.models.resnet import resnet
from dhbe.report.folder import si, speeds, work
from dhbe.training.runtime import Runtime
from dhbe.training.supervised import Loss, Supervised, cross_entropy
from dhbe.training.work import Counting
from tests.support.fixtures import make_spec, small
from tests.support.game import CPU, make_game, players
from tests.support.victim import StopAfter, schedule

MakeRuntime = Callable[..., Runtime]
BATCHES = 10
"""Of 8 images; more than a sample holds."""


def test_resnet18_by_hand() -> None:
    """Multiply-adds of a 32-pixel image: 3x3 stem, four stages of four 3x3 convolutions, head."""
    stem = 3 * 64 * 9 * 32**2
    stages = 4 * 64 * 64 * 9 * 32**2
    for width, side in ((128, 16), (256, 8), (512, 4)):
        halving, shortcut = width // 2 * width * 9 * side**2, width // 2 * width * side**2
        stages += halving + shortcut + 3 * width * width * 9 * side**2
    forward = 2 * (stem + stages + 512 * 10)
    assert forward == 1_110_845_440
    network = resnet(depth=18, stem="cifar", classes=10, channels=3, image_size=32)
    images = torch.rand(2, 3, 32, 32)
    with Counting() as once, torch.inference_mode():
        network(images)
    with Counting() as both:
        network(images).sum().backward()
    with FlopCounterMode(display=False) as torchs:
        network(images).sum().backward()
    assert once.flops == 2 * forward
    assert both.flops == torchs.get_total_flops()
    # Backward: gradients of weights and of inputs, but nobody needs those of the images.
    assert both.flops == 2 * (3 * forward - 2 * stem)


def test_bytes_by_hand() -> None:
    a, b = torch.zeros(3, 5), torch.zeros(5, 7)
    with Counting() as counting:
        c = a @ b  # reads 15 + 35 floats, writes 21
        c.t()  # a view moves nothing
        c += 1  # reads and writes 21
    assert counting.bytes == 4 * (15 + 35 + 21 + 21 + 21)
    assert counting.flops == 2 * 3 * 5 * 7


def fit(
    runtime: Runtime,
    images: Resident,
    *,
    epochs: int,
    loss: Loss = cross_entropy,
    **options: Any,
) -> nn.Module:
    batches = TrainingBatches(images, spec=make_spec(), batch_size=8, seed=0, device=CPU)
    network = small()
    module = Supervised(network, batches, schedule(epochs), role="x", loss=loss)
    runtime.fit(module, batches, epochs=epochs, **options)
    return network


def step(images: Resident) -> int:
    """FLOP of a forward and a backward pass of 8 images."""
    with Counting() as counting:
        small()(images.images[:8].float()).sum().backward()
    return counting.flops


def test_samples_stand_for_all_batches_and_trainings_add_up(
    images: Resident, make_runtime: MakeRuntime
) -> None:
    runtime = make_runtime(count=True)
    assert runtime.work_total.work is None
    fit(runtime.stage("teacher"), images, epochs=4)
    fit(runtime, images, epochs=2)
    assert runtime.work_total.work is not None
    assert runtime.work_total.work.flops == 6 * BATCHES * step(images)
    assert runtime.work_total.work.seconds > 0
    assert runtime.work_total.work.bytes > 0


def test_what_happens_in_each_fifth_batch_and_in_first_epochs_is_counted_right(
    images: Resident, make_runtime: MakeRuntime
) -> None:
    def loss(network: nn.Module, batch: Batch) -> torch.Tensor:
        fifth = round(batch.progress * BATCHES) % 5 == 0
        for _ in range(fifth + 4 * (batch.progress <= 2)):
            F.cross_entropy(network(batch.images), batch.labels).backward()
        return cross_entropy(network, batch)

    runtime = make_runtime(count=True)
    fit(runtime, images, epochs=7, loss=loss)
    steps = 7 * BATCHES + 7 * BATCHES // 5 + 4 * 2 * BATCHES
    assert runtime.work_total.work is not None
    assert runtime.work_total.work.flops == pytest.approx(steps * step(images), rel=1e-12)


def test_a_resumed_training_counts_like_a_whole_one(
    images: Resident, make_runtime: MakeRuntime
) -> None:
    with pytest.raises(InterruptedError):
        fit(make_runtime(count=True), images, epochs=6, callbacks=[StopAfter(3)])
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    for attempt in ("resumed in the middle of what a sample stands for", "already finished"):
        runtime = make_runtime(count=True)
        fit(runtime, images, epochs=6)
        assert runtime.work_total.work is not None
        assert runtime.work_total.work.flops == 6 * BATCHES * step(images), attempt


@pytest.mark.long
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_counting_changes_no_number(
    precision: str, images: Resident, make_runtime: MakeRuntime
) -> None:
    def trained(work: str, count: bool) -> list[dict[str, torch.Tensor]]:
        runtime = make_runtime(work=work, precision=precision, count=count)
        network = fit(runtime.stage("supervised"), images, epochs=2)
        noise = SeededNoise(0, device=CPU, dtype=torch.float32)
        game = make_game(*players(torch.float32), noise, epochs=2)
        runtime.fit(game, range(3), epochs=2)
        assert (runtime.work_total.work is not None) == count, "opt-in"
        return [network.state_dict(), game.state_dict()]

    counted, plain = trained("counted", True), trained("plain", False)
    for ours, theirs in zip(counted, plain, strict=True):
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), key


@pytest.mark.long
def test_an_iteration_of_the_game_by_hand(make_runtime: MakeRuntime) -> None:
    """42 passes of the network, student 5 x 7, G 4, P 3, and those of the two generators."""
    network, generator, trigger = players(torch.float32)
    noise = SeededNoise(0, device=CPU, dtype=torch.float32)
    runtime = make_runtime(count=True)
    runtime.fit(make_game(network, generator, trigger, noise), range(8), epochs=1)
    assert runtime.work_total.work is not None

    def passes(net: nn.Module, *shape: int) -> int:
        with Counting() as counting, torch.no_grad():
            net(torch.zeros(4, *shape))
        return counting.flops

    classify, draw, patch = passes(network, 3, 16, 16), passes(generator, 8), passes(trigger, 8)
    stem = 2 * 4 * 3 * 16 * 9 * 16**2
    latents = [2 * 4 * net.project.weight.numel() for net in (generator, trigger)]
    student = 5 * (1 + 2 * 3) * classify - 5 * 2 * stem  # T forward, S on x and x', no dx
    generators = 4 * classify + 3 * draw - latents[0]  # T and S forward and dx; G, no dz
    triggers = 3 * classify + 3 * patch - latents[1]  # S(x), S(x') and dx'; P, no dz
    served = (5 + 1) * draw + 5 * patch  # images for S and P, patches for S
    assert runtime.work_total.work.flops == 8 * (student + generators + triggers + served)


def test_figures_of_the_report() -> None:
    assert [si(v) for v in (0, 12, 1.1108e9, 999.9e12)] == ["0 ", "12 ", "1.11 G", "1 P"]
    metrics = {
        "flops": {"victim": 3e15, "defense": None},
        "bytes": {"victim": 2e12, "defense": None},
        "trained_seconds": {"victim": 10.0, "defense": None},
        "peak_flops": 1e15,
        "cached_victim": False,
    }
    assert work(metrics, "victim") == "3 PFLOP, 2 TB; 300 TFLOP/s (30.0 % of bf16 peak)"
    assert speeds(metrics | {"cached_victim": True}, "victim")["share_of_peak"] is None
    assert work(metrics | {"peak_flops": None}, "victim") == "3 PFLOP, 2 TB; 300 TFLOP/s"
    assert work(metrics, "defense") == work({}, "victim") == "–"


@pytest.mark.long
def test_the_benchmark_scales_to_what_it_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of 8 by those of 2 and 4; 100 epochs of fine-tuning by a few dozen small steps."""
    monkeypatch.setattr("dhbe.training.resuming.LastEpoch.on_train_epoch_end", lambda *_: None)
    whole, estimate = (f(flops.victim, "resnet_tiny", 8) for f in (flops.step, flops.scaled))
    assert (estimate.flops, estimate.bytes) == (whole.flops, whole.bytes)
    tuned = flops.trainings("finetune", "resnet_tiny")
    assert tuned is not None
    images = 32 * 8 * (78 // 8)  # 5 % of 50,000 / 32, in whole batches of 256 / 32
    assert tuned.flops == pytest.approx(100 * images * whole.flops / 8)
