"""The defense contract over every defense config, and each method's mathematics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torch.nn import functional as F

from defenses.clp import CLP, channel_lipschitz
from defenses.finetune import FineTune
from dhbe.config.schema import plain
from dhbe.core.errors import ArtefactError, BudgetError, ConfigError, DivergenceError
from dhbe.core.types import Suspect
from dhbe.data import Budget, DefenderData, Resident
from dhbe.models import Normalized
from dhbe.models.dataflow import conv_bn_pairs
from dhbe.models.other import PlainVGG, vgg19_bn
from dhbe.models.preact import PreActBlock, PreActResNet18, WideResNet, _stages
from dhbe.models.resnet import resnet
from dhbe.training.recorder import Recorder
from dhbe.training.schedule import Cosine, SGDSchedule
from tests.conftest import CONF, ROOT, each_class, names, sampled
from tests.support.defenses import (
    DEFENSES,
    build,
    granted,
    rich,
    suspect,
)
from tests.support.fixtures import make_spec

DOORS = ("clean", "validation", "poisoned", "incoming", "oracle")


def watched(data: DefenderData) -> tuple[DefenderData, set[str]]:
    """The same data, and the names of the doors that are opened."""
    asked: set[str] = set()

    def spy(door, real, *args, **kwargs):
        asked.add(door)
        return real(*args, **kwargs)

    for door in DOORS:
        setattr(data, door, partial(spy, door, getattr(data, door)))
    return data, asked


class Forbidden(DefenderData):
    """Raises on every look at data."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def _never(self, *args, **kwargs):
        raise AssertionError("a data-free defense asked for data")

    clean = validation = poisoned = incoming = oracle = _never


def test_all_defenses_are_listed() -> None:
    files = {p.stem for p in (CONF.parent / "defenses").glob("[a-z]*.py")}
    assert files <= set(DEFENSES), "each has a config of its name"


@pytest.mark.parametrize("name", each_class("defense"))
def test_contract(name: str, compose_config, images: Resident, make_runtime) -> None:
    defense, victim = build(name, compose_config), suspect()
    before = copy.deepcopy(victim.network.state_dict())
    needs = defense.needs
    free = not (needs.clean or needs.poisoned or needs.incoming)
    results = []
    offered, asked = watched(rich(images))
    for data in (Forbidden(Budget(name="none")) if free else rich(images), offered):
        runtime = make_runtime(work=f"run{len(results)}")
        results.append(defense(victim, data, runtime))
    owned = {"clean", "validation"} if needs.clean else set()
    owned |= {d for d in ("poisoned", "incoming") if getattr(needs, d)}
    assert asked <= owned, "looks at what it does not declare"
    assert asked or not owned, "declares a need that it does not use"
    said = " ".join(runtime.recorder.notes)
    detects = name.startswith(("auto", "cetf", "neural_cleanse", "scan", "ulrl"))
    assert (runtime.recorder.suspected is not None) == detects
    for key, value in victim.network.state_dict().items():
        assert torch.equal(value, before[key]), f"the suspect's {key} changed"
    x = torch.rand(3, *victim.spec.shape)
    first, second = (r(x) for r in results)
    assert first.shape == (3, victim.spec.classes)
    assert torch.equal(first, second), "deterministic under a seed"
    assert not results[0].training
    assert results[0].state_dict().keys() == before.keys()
    assert results[0] is not victim.network
    reloaded = copy.deepcopy(victim.network)
    reloaded.load_state_dict(results[0].state_dict())
    if results[0].unwritten:
        assert name == "ssft", "what was measured is not what the weights say"
        assert results[0].unwritten in said
    else:
        torch.testing.assert_close(reloaded(x), first)


def test_guidance_without_statistics_is_said(compose_config, make_runtime) -> None:
    """A network without BatchNorm gives the generator nothing to match."""
    defense, spec, said = build("dhbe_guided", compose_config), make_spec(), {}
    for norm in (nn.Identity(), nn.BatchNorm2d(8)):
        inner = nn.Sequential(
            nn.Conv2d(3, 8, 3), norm, nn.AvgPool2d(14), nn.Flatten(), nn.Linear(8, 4)
        )
        runtime = make_runtime(work=type(norm).__name__)
        victim = Suspect(network=Normalized(inner, spec).eval(), architecture="own", spec=spec)
        defense(victim, Forbidden(Budget(name="none")), runtime)
        said[type(norm)] = "weights.statistics has no effect" in str(runtime.recorder.notes)
    assert said == {nn.Identity: True, nn.BatchNorm2d: False}


def narrow_preact() -> PreActResNet18:
    network = PreActResNet18(classes=4, channels=3, image_size=16)
    network.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
    network.blocks, network.head = _stages([16, 16, 24, 32, 48], blocks=2), nn.Linear(48, 4)
    return network


KINDS = {  # beside the post-activation ResNet of the other tests
    "preact": narrow_preact,
    "wrn_16_1": lambda: WideResNet(depth=16, widen=1, classes=4, channels=3, image_size=16),
    "vgg_bn": lambda: PlainVGG(layers=[16, 16, 0, 24, 0, 32], classes=4, channels=3, image_size=16),
}


FILES = sorted(p.stem for p in (ROOT / "defenses").glob("[a-z]*.py"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (i + 16 * j) % 48 == 0 else pytest.mark.long)
        for i, name in enumerate(FILES)
        for j, kind in enumerate(KINDS)
    ],
)
def test_every_method_takes_every_kind_of_network(
    name: str, kind: str, compose_config, images: Resident, make_runtime, caplog
) -> None:
    defense, spec = build(name, compose_config), make_spec()
    torch.manual_seed(0)
    network = Normalized(KINDS[kind](), spec)
    network(torch.rand(32, *spec.shape))
    victim = Suspect(network=network.eval(), architecture=kind, spec=spec)
    if kind == "vgg_bn" and name in ("ssft", "trap_and_replace"):
        with pytest.raises(ConfigError, match=f"defense={name}: .* 0 residual blocks"):
            defense(victim, rich(images), make_runtime())
        return
    purified = defense(victim, rich(images), make_runtime())
    x = torch.rand(3, *spec.shape)
    changed = not torch.equal(purified(x), network(x))
    told = defense.idle or "changed no weight" in caplog.text
    seeks = name in ("anp", "rnp", "cetf", "neural_cleanse", "scan_unlearn", "auto")
    trains = any("schedule" in option for option in vars(defense))
    assert changed or (told and (seeks or not trains)), "may find nothing to prune or no trigger"


@pytest.mark.parametrize("name", sampled(names("defense"), 6))
def test_nan_weights_are_refused(name: str, compose_config, images, make_runtime) -> None:
    victim = suspect()
    next(victim.network.parameters()).data[0] = float("nan")
    with pytest.raises(ArtefactError, match="NaN"):
        build(name, compose_config)(victim, rich(images), make_runtime())


@pytest.mark.parametrize(
    ("value", "what"), [(float("nan"), "infinite weights"), (1e30, "logits are NaN")]
)
def test_a_diverged_network_is_never_a_result(
    value: float, what: str, make_runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither NaN in the weights nor finite weights whose products overflow."""

    def diverge(network: Normalized, *_) -> Normalized:
        for p in network.parameters():
            p.data.mul_(value)
        return network

    defense = CLP(u=3)
    monkeypatch.setattr(defense, "repair", diverge)
    with pytest.raises(DivergenceError, match=what):
        defense(suspect(), Forbidden(Budget(name="none")), make_runtime())


def test_budget_below_the_needs_is_refused_before_work(compose_config) -> None:
    defense = build("finetune", compose_config)
    with pytest.raises(
        BudgetError, match=r"budget=none: FineTune needs clean images; set budget=pct1"
    ):
        defense.check(Budget(name="none"))


def test_defender_gets_what_is_granted_and_no_more(images: Resident) -> None:
    data = granted(images, fraction=0.1)
    assert len(data.clean()) == 40
    assert data.clean().labels.bincount().tolist() == [10] * 4
    fit, held = data.clean(hold_out_validation=True), data.validation()
    assert (len(fit), len(held)) == (32, 8)
    rows = {tuple(x.flatten()[:50].tolist()) for x in fit.resident().images}
    assert not rows & {tuple(x.flatten()[:50].tolist()) for x in held.resident().images}
    one = granted(images, per_class=1)
    assert sorted(one.clean().labels.tolist()) == [0, 1, 2, 3]
    with pytest.raises(BudgetError, match="grants no poisoned training set"):
        data.poisoned()
    with pytest.raises(BudgetError, match="grants no incoming images"):
        data.incoming()
    with pytest.raises(BudgetError, match="grants no clean images"):
        granted(images).clean()
    with pytest.raises(BudgetError, match=r"200 clean images, but the defender's pool holds 80"):
        granted(images, fraction=0.5)
    with pytest.raises(BudgetError, match="holds 20 of the rarest class"):
        granted(images, per_class=21)


def test_defender_data_has_no_door_to_the_test_set() -> None:
    public = {n for n in dir(DefenderData) if not n.startswith("_")}
    assert public == {"clean", "validation", "poisoned", "incoming", "oracle"}


def test_oracle_is_closed_unless_it_is_chosen(images: Resident) -> None:
    with pytest.raises(BudgetError, match=r"defense\.selection=oracle opens it"):
        granted(images, fraction=0.1).oracle(nn.Identity())
    data = DefenderData(
        Budget(), pool=images, train_size=400, seed=0, oracle=lambda net: {"acc": 1.0, "asr": 0.5}
    )
    assert data.oracle(nn.Identity()) == {"acc": 1.0, "asr": 0.5}
    data = DefenderData(
        Budget(), pool=images, train_size=400, seed=0, oracle=lambda net: {"acc": 1.0}
    )
    with pytest.raises(ConfigError, match=r"defense\.selection=oracle: expected fixed"):
        data.oracle(nn.Identity())


def test_two_images_leave_one_to_validate_on(images: Resident) -> None:
    two = images.subset((images.labels < 2).nonzero().flatten())
    data = granted(two, per_class=1)
    assert (len(data.clean(hold_out_validation=True)), len(data.validation())) == (1, 1)
    single = granted(images, fraction=1 / 400)
    assert len(single.clean()) == 1
    with pytest.raises(BudgetError, match="budget=test: one clean image cannot both"):
        single.clean(hold_out_validation=True)


def test_incoming_images_are_half_triggered_and_not_the_granted_ones(images: Resident) -> None:
    def whiten(x, y, index):
        return torch.ones_like(x)

    budget = Budget(fraction=0.1, incoming=10)
    data = DefenderData(budget, pool=images, train_size=400, seed=0, trigger=whiten)
    inputs = data.incoming()
    white = (inputs.images == 255).flatten(1).all(1)
    assert white.tolist() == [True, False] * 5
    assert inputs.labels.eq(-1).all()
    own = {tuple(x.flatten()[:50].tolist()) for x in data.clean().resident().images}
    assert not own & {tuple(x.flatten()[:50].tolist()) for x in inputs.images[1::2]}


def test_channel_lipschitz_by_singular_values() -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    norm.weight.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    conv.requires_grad_(False)
    norm.requires_grad_(False)
    found = channel_lipschitz(conv, norm)
    for k in range(5):
        singular = torch.linalg.svdvals(conv.weight[k].reshape(3, 9))[0]
        scale = norm.weight[k].abs() / (norm.running_var[k] + norm.eps).sqrt()
        assert float(found[k]) == pytest.approx(float(singular * scale), rel=1e-5)


def test_clp_prunes_the_channel_that_stands_out(make_runtime) -> None:
    victim = suspect()
    block = victim.network.network.stages[1][0]
    block.conv1.weight.data[3] *= 100
    purified = CLP(u=2.0)(victim, Forbidden(Budget(name="none")), make_runtime())
    norm = purified.network.stages[1][0].bn1
    assert norm.weight[3] == 0
    assert norm.bias[3] == 0
    assert (norm.weight == 0).sum() == 1


LARGE = {"classes": 4, "channels": 3, "image_size": 32}


@pytest.mark.parametrize(
    ("make", "pairs"),
    [
        pytest.param(partial(WideResNet, depth=16, widen=1, **LARGE), 7, id="wrn_16_1"),
        pytest.param(partial(PreActResNet18, **LARGE), 9, id="preact_resnet18"),
        *(
            pytest.param(make, pairs, id=name, marks=pytest.mark.long)
            for name, make, pairs in (
                ("resnet18", partial(resnet, depth=18, stem="cifar", **LARGE), 20),
                ("vgg19_bn", partial(vgg19_bn, **LARGE), 16),
            )
        ),
    ],
)
def test_pairs_follow_the_data(make: Callable[[], nn.Module], pairs: int) -> None:
    """A convolution and the BatchNorm behind it, never one behind a sum.

    Pre-activation: conv1 -> bn2 of each block, and the stem -> first bn1.
    """
    network = make().eval()
    found = conv_bn_pairs(network, torch.zeros(1, 3, 32, 32))
    assert len(found) == pairs
    for conv, norm in found:
        assert conv.out_channels == norm.num_features
    names = {m: n for n, m in network.named_modules()}
    if isinstance(network, PreActResNet18):
        inner = [(names[c], names[n]) for c, n in found[1:]]
        assert all(c.endswith("conv1") and n.endswith("bn2") for c, n in inner)


class Spelled(nn.Module):
    """A pre-activation network of three blocks that sums in one of the ways people write it."""

    def __init__(self, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.add, self.stem = add, nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(PreActBlock(8, 8, 1) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for b in self.blocks:
            inner = b.conv2(F.relu(b.bn2(b.conv1(F.relu(b.bn1(x))))))
            x = self.add(inner, x)
        return x


def in_place(out: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
    out += shortcut
    return out


@pytest.mark.parametrize(
    "add", [torch.add, in_place, lambda out, shortcut: shortcut.add_(out)], ids=["new", "out", "x"]
)
def test_pairs_are_those_of_the_network_however_it_spells_its_sums(add) -> None:
    """The stem feeds the first bn1, each conv1 its bn2; no conv2 feeds a BatchNorm (by hand: 4)."""
    network = Spelled(add).eval()
    found = conv_bn_pairs(network, torch.rand(1, 3, 8, 8))
    first, blocks = network.blocks[0], network.blocks
    assert found == [(network.stem, first.bn1), *((b.conv1, b.bn2) for b in blocks)]


def test_clp_refuses_a_network_without_batchnorm(make_runtime) -> None:
    spec = make_spec()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    victim = Suspect(network=Normalized(network, spec), architecture="linear", spec=spec)
    with pytest.raises(ConfigError, match="use defense=dhbe"):
        CLP(u=3.0)(victim, Forbidden(Budget(name="none")), make_runtime())


def test_dhbe_refuses_sizes_it_cannot_play(compose_config) -> None:
    defense = build("dhbe", compose_config)
    with pytest.raises(ConfigError, match=r"data\.image_size=30"):
        defense.fits(make_spec(image_size=30))
    node = plain(compose_config("defense=dhbe", "defense.patch_size=40"))["defense"]
    with pytest.raises(ConfigError, match=r"defense\.patch_size=40: expected at most"):
        instantiate(node, _convert_="all").fits(make_spec(image_size=32))


def test_finetune_changes_weights_within_its_budget(images, make_runtime) -> None:
    schedule = SGDSchedule(
        epochs=2,
        batch_size=256,
        learning_rate=0.05,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        shape=Cosine(end=0.0),
    )
    victim = suspect()
    purified = FineTune(schedule=schedule)(victim, granted(images, fraction=0.1), make_runtime())
    assert not torch.equal(purified.network.head.weight, victim.network.network.head.weight)


class Dying(Recorder):
    """Ends the run after the third epoch, before its checkpoint is written."""

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.current_epoch == 2:
            raise InterruptedError


@pytest.mark.long
@pytest.mark.parametrize("name", ["dhbe", "dfad"])
def test_killed_game_resumes_to_the_same_student(
    name: str, compose_config, make_runtime, tmp_path: Path
) -> None:
    defense = build(name, compose_config)
    defense.epochs, defense.iterations = 5, 2
    data = Forbidden(Budget(name="none"))
    whole = defense(suspect(), data, make_runtime(work="whole"))
    runtime = make_runtime(work="killed")
    runtime.recorder = Dying()
    with pytest.raises(InterruptedError):
        defense(suspect(), data, runtime)
    state = torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1  # the third epoch was not saved; what follows goes on from here
    runtime = make_runtime(work="killed")
    resumed = defense(suspect(), data, runtime)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
