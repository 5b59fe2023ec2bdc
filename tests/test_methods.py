"""What several defenses share, against slow, obvious references."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import timm
import torch
from scipy.optimize import OptimizeResult
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer

from defenses.fip import fisher_trace
from dhbe.core.errors import ConfigError
from dhbe.core.rng import generator
from dhbe.data import Budget, DefenderData, Resident, TrainingBatches, even
from dhbe.methods.adversarial import universal
from dhbe.methods.losses import denial, divergence_beside
from dhbe.methods.masks import attach, batch_norms, clamp, fold, prune
from dhbe.methods.rectangles import Stagnation, rectangles
from dhbe.methods.selection import accuracy, choose
from dhbe.methods.statistics import outliers
from dhbe.models import Normalized
from dhbe.models.dataflow import classifier
from dhbe.models.hooks import capture, executed_after, frozen_statistics, smooth_cam, stages
from dhbe.models.normalized import fresh
from dhbe.models.other import vgg19_bn
from dhbe.models.preact import PreActResNet18, WideResNet
from dhbe.models.resnet import resnet
from tests.conftest import sampled
from tests.support.attacks import tiny
from tests.support.defenses import batch, build, granted, self_labelled
from tests.support.fixtures import make_spec

SPEC = make_spec()


def test_masks_scale_and_fold() -> None:
    network = tiny(SPEC)
    x, _ = batch()
    before, plain = network(x), copy.deepcopy(network.state_dict())
    layers = batch_norms(network, method="x")
    scales = attach(layers)
    torch.testing.assert_close(network(x), before)
    scales[0].mask.data[:] = torch.linspace(-1, 2, 16)
    clamp(scales)
    assert scales[0].mask.min() == 0
    assert scales[0].mask.max() == 1
    changed = network(x)
    fold(layers)
    torch.testing.assert_close(network(x), changed)
    assert network.state_dict().keys() == plain.keys()
    expected = plain["network.stem.1.weight"] * torch.linspace(-1, 2, 16).clamp(0, 1)
    torch.testing.assert_close(layers[0].weight, expected)
    attach(layers)[0].mask.data.zero_()
    fold(layers, keep=False)
    torch.testing.assert_close(network(x), changed)


def test_the_denial_of_a_certain_class_keeps_its_gradient() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [60.0, 0.0, 0.0]], requires_grad=True)
    denied = denial(logits, torch.tensor([1, 0]))
    denied.sum().backward()
    p = logits.detach().softmax(dim=1)[0, 1]
    assert denied[0].item() == pytest.approx(-(1 - p).log().item(), abs=1e-5)
    assert denied[1].item() == pytest.approx(60 - math.log(2))
    assert logits.grad is not None
    assert logits.grad[1].tolist() == pytest.approx([1.0, -0.5, -0.5])


def test_divergence_beside_the_target_is_of_the_other_classes_alone() -> None:
    wanted = torch.tensor([[0.0, 5.0, 1.0]]).log_softmax(1)
    assert divergence_beside(wanted + torch.tensor([[9.0, 2.0, 2.0]]), wanted, 0).item() == (
        pytest.approx(0, abs=1e-6)
    )
    p = torch.tensor([4.0, 0.0]).softmax(0)  # of classes 1 and 2
    expected = (p * (p / 0.5).log()).sum().item()
    found = divergence_beside(torch.tensor([[7.0, 3.0, 3.0]]), wanted, 0)
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_prune_zeroes_gamma_at_or_below_the_threshold() -> None:
    layer = nn.BatchNorm2d(4)
    assert prune([layer], [torch.tensor([0.1, 0.2, 0.3, 0.9])], 0.2) == 2
    assert layer.weight.tolist() == [0, 0, 1, 1]


def test_networks_without_batchnorm_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"defense=anp: the network has no BatchNorm.*use a defense that"
    ):
        batch_norms(nn.Conv2d(1, 1, 1), method="anp")


def test_outliers_of_ten_classes_take_the_lower_median() -> None:
    """0 .. 9: median 4, MAD 2 (not 4.5 and 2.5), so 9 lies 5 / 2.9652 = 1.69 deviations above."""
    values = np.arange(10.0)
    assert outliers(values, 1.68, side="above") == [9]
    assert outliers(values, 1.69, side="above") == []
    rng = generator(0)
    for _ in range(50):
        drawn = torch.randn(10, generator=rng, dtype=torch.float64)
        away = drawn - torch.median(drawn)  # as the official codes write it
        index = away.abs() / (1.4826 * torch.median(away.abs()))
        official = ((index > 1.5) & (away > 0)).nonzero().flatten().tolist()
        assert outliers(drawn.numpy(), 1.5, side="above") == official


def test_outliers_by_hand() -> None:
    """Median 3, MAD 1: 10 lies 7 / 1.4826 = 4.7 deviations above."""
    values = np.array([1.0, 2, 3, 4, 10])
    assert outliers(values, 4.5, side="above") == [4]
    assert outliers(values, 4.8, side="above") == []
    assert outliers(-values, 4.5, side="below") == [4]


def test_passes_with_frozen_statistics_leave_them_and_carry_gradients() -> None:
    network = tiny(SPEC).train()
    x, _ = batch()
    before = copy.deepcopy(network.state_dict())
    out = frozen_statistics(network, x)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    torch.testing.assert_close(out, copy.deepcopy(network)(x))
    moved = {k: (p + 0.1).detach().requires_grad_(True) for k, p in network.named_parameters()}
    frozen_statistics(network, x, moved).sum().backward()
    assert all(w.grad is not None for w in moved.values())


@pytest.mark.parametrize(
    ("make", "count"),
    sampled(
        [
            (partial(WideResNet, depth=16, widen=1, classes=10, channels=3, image_size=32), 3),
            (partial(resnet, depth=18, stem="cifar", classes=10, channels=3, image_size=32), 4),
            (partial(PreActResNet18, classes=10, channels=3, image_size=32), 4),
            (partial(vgg19_bn, classes=10, channels=3, image_size=32), 4),
        ],
        4,
    ),
    ids=["wrn", "resnet18", "preact", "vgg"],
)
def test_stages_go_from_fine_to_coarse(make: Callable[[], nn.Module], count: int) -> None:
    network = make().eval()
    found = stages(network, torch.zeros(2, 3, 32, 32))
    with capture(found) as seen, torch.no_grad():
        network(torch.zeros(2, 3, 32, 32))
    sizes = [f.shape[-1] for f in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes) >= count
    head = executed_after(network, found[-1], torch.zeros(2, 3, 32, 32))
    assert head[-1] is classifier(network)


@pytest.mark.parametrize(
    ("selection", "expected"), [("fixed", 0.1), ("validation", 0.5), ("oracle", 0.9)]
)
def test_choice_follows_the_selection(
    selection: str, expected: float, images: Resident, make_runtime
) -> None:
    """0.9 alone costs accuracy; an oracle that sees ASR fall to 0 by it takes it nevertheless."""
    network = tiny(SPEC)
    labels = self_labelled(images, network)

    def measure(net) -> dict[str, float]:
        spoilt = bool((classifier(net).weight == 0).all())
        return {"acc": 0.8 - 0.5 * spoilt, "asr": 1.0 - spoilt}

    data = DefenderData(Budget(fraction=0.2), pool=labels, train_size=400, seed=0, oracle=measure)

    def spoil(net, share):
        if share > 0.5:
            classifier(net).weight.data.zero_()
            classifier(net).bias.data.copy_(torch.tensor([9.0, 0, 0, 0]))

    choice, chosen = choose(
        network,
        [0.1, 0.5, 0.9],
        spoil,
        fixed=0.1,
        selection=selection,
        max_drop=0.1,
        data=data,
        runtime=make_runtime(),
    )
    assert choice == expected
    assert (accuracy(chosen, data.validation(), make_runtime()) == 1) == (expected < 0.9)
    assert (classifier(network).weight != 0).any(), "works on copies"


@pytest.mark.parametrize(("relative", "expected"), [(False, 0.5), (True, 0.2)])
def test_a_drop_in_points_or_in_shares(
    relative: bool, expected: float, images: Resident, make_runtime
) -> None:
    """From 50 % by 10: 42 % are within 10 points, but below nine tenths."""
    accuracies = {0.0: 0.5, 0.2: 0.46, 0.5: 0.42, 0.9: 0.39}

    def mark(net: Normalized, choice: float) -> None:
        classifier(net).bias.data[0] = choice

    def measure(net: Normalized) -> float:
        return accuracies[round(float(classifier(net).bias[0].detach()), 1)]

    network = tiny(SPEC)
    mark(network, 0.0)
    choice, _ = choose(
        network,
        [*accuracies],
        mark,
        fixed=0.0,
        selection="validation",
        max_drop=0.1,
        data=granted(images, fraction=0.1),
        runtime=make_runtime(),
        relative=relative,
        measure=measure,
    )
    assert choice == expected


def test_universal_perturbation_changes_predictions() -> None:
    network = tiny(SPEC)
    x, _ = batch(16)
    images = Resident(x.mul(255).byte(), torch.zeros(16, dtype=torch.long))
    batches = TrainingBatches(
        images, spec=SPEC, batch_size=8, seed=0, device=torch.device("cpu"), steps=6
    )
    delta = universal(network, batches, learning_rate=1e4)
    assert delta.shape == (1, *SPEC.shape)
    with torch.no_grad():
        kept = network(x).argmax(1) == network(x + delta).argmax(1)
    assert kept.float().mean() < 1


def test_few_images_are_divided_evenly() -> None:
    found = [even(n, 128) for n in (500, 400, 128, 129, 40)]
    assert found == [125, 100, 128, 64, 40]


def test_cosine_may_end_above_zero(compose_config) -> None:
    schedule = build("nft", compose_config).schedule
    rates = [schedule.learning_rate * schedule.factor(p / 5) for p in range(6)]
    assert rates == pytest.approx([0.05, 0.0471, 0.0396, 0.0304, 0.0229, 0.02], abs=5e-5)


def test_the_trace_goes_through_attention() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    with sdpa_kernel(SDPBackend.MATH):  # as FIP does
        out, _ = attention(x, x, x, need_weights=False)
    each = out.square().mean(dim=(1, 2))
    fisher_trace(each, list(attention.parameters()), generator(0)).backward()
    assert float(attention.in_proj_weight.grad.abs().sum()) > 0


def test_evolution_ends_without_progress() -> None:
    ends = Stagnation()
    values = [5.0, 4.0, *[4.0 - 1e-7] * 12]
    said = [ends(OptimizeResult(fun=v)) for v in values]
    assert said.index(True) == 11, "ten generations after the second"


def test_rectangles_by_hand() -> None:
    found = rectangles(torch.tensor([[1], [2], [2], [1]]), 4)[0]
    assert found.nonzero().tolist() == [[1, 2], [2, 2]]


def test_class_activation_looks_at_the_bright_spot() -> None:
    network = tiny(SPEC)
    x = torch.zeros(SPEC.shape)
    x[:, 10:14, 10:14] = 1
    heat = smooth_cam(network, x, 0, 0)
    assert heat.shape == (16, 16)
    assert heat.min() >= 0


def test_fresh_networks_are_new_and_seeded() -> None:
    vit = timm.create_model(
        "vit_tiny_patch16_224", num_classes=4, img_size=16, patch_size=8, depth=1
    )
    for network in (tiny(SPEC), Normalized(vit, SPEC), Normalized(Attentive(), SPEC)):
        trained(network)
        a, b, c = (dict(fresh(network, s, method="x").named_parameters()) for s in (1, 1, 2))
        for key, old in network.named_parameters():
            assert torch.equal(a[key], b[key])
            assert not torch.equal(a[key], old), key
            constant = (a[key] == a[key].flatten()[0]).all()
            assert constant or not torch.equal(a[key], c[key]), key


@pytest.mark.parametrize(("name", "weight"), [("vit_b_32", "class_token"), ("convnext", "gamma")])
def test_a_network_that_cannot_start_anew_is_refused(name: str, weight: str) -> None:
    if name == "convnext":
        network = timm.create_model("convnext_atto", num_classes=4, depths=(1, 1, 1, 1))
    else:
        network = VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=4)
    suspect = trained(Normalized(network, SPEC))
    with pytest.raises(
        ConfigError, match=rf"defense=abl: it trains anew, .*{weight}.*repairs the trained"
    ):
        fresh(suspect, 1, method="abl")


class Attentive(nn.Module):
    """Attention's own weights are drawn by a method of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 4)


def trained(network: Normalized) -> Normalized:
    """The network with no weight where it was, so that none is a constant."""
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p))
    return network
