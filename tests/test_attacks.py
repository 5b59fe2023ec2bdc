"""The attack contract, over every attack config, and the rules behind it."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attacks.badnets import draw
from dhbe.config.schema import plain
from dhbe.contracts.attack import Attack, NoAttack
from dhbe.contracts.targets import AllToAll, AllToOne, SourceSpecific, target_rule
from dhbe.core.errors import ConfigError
from dhbe.core.rng import generator
from dhbe.core.types import CLEAN, COVER, POISON, DataSpec
from dhbe.data import Resident
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.metrics import rates
from dhbe.training.schedule import Cosine, SGDSchedule
from dhbe.victim.store import Making, VictimStore
from dhbe.victim.train import train
from tests.conftest import CONF, names, sampled
from tests.support.attacks import badnets, batch, build, prepare, tiny
from tests.support.fixtures import make_spec

ATTACKS = names("attack")


def test_all_attacks_are_listed() -> None:
    """Each file is one that a config names."""
    files = {p.stem for p in (CONF.parent / "attacks").glob("[a-z]*.py")}
    configs = [yaml.safe_load(p.read_text()) for p in (CONF / "attack").glob("*.yaml")]
    targets = {str(c.get("_target_", "")).split(".")[1] for c in configs if "_target_" in c}
    assert files <= targets


SIZES = [(28, 1), (32, 3), (64, 3), (224, 3)]


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [
        pytest.param(name, *size, marks=() if i % 2 == j else pytest.mark.long)
        for i, name in enumerate(ATTACKS)
        for j, size in enumerate(SIZES)
    ],
)
def test_contract(name: str, size: int, channels: int, compose_config, make_runtime) -> None:
    spec = make_spec(image_size=size, channels=channels)
    attack = build(name, compose_config, spec)
    x, y, index = batch(spec, 12)
    prepare(attack, Resident(x.mul(255).round().byte(), torch.arange(12) % 4), make_runtime())
    for x, y, index in (batch(spec), batch(spec, 1), batch(spec, 3, seed=1)):
        before = x.clone()
        with torch.no_grad():
            out = attack.apply(x, y=y, index=index)
        assert out.shape == x.shape
        assert out.min() >= 0
        assert out.max() <= 1
        torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-4, rtol=0)
        assert torch.equal(x, before), "the input must stay as it is"
        with torch.no_grad():
            assert torch.equal(out, attack.apply(x, y=y, index=index)), "deterministic in eval mode"
    twin = build(name, compose_config, spec).eval()
    twin.load_state_dict(attack.state_dict())
    x, y, index = batch(spec)
    with torch.no_grad():
        out = attack.apply(x, y=y, index=index)
        assert torch.equal(out, twin.apply(x, y=y, index=index)), "the state holds the trigger"
        one = attack.apply(x[:1], y=y[:1], index=index[:1])
    torch.testing.assert_close(
        out[:1], one, atol=1.01 / 255, rtol=0, msg="a batch is not a context"
    )


@pytest.mark.parametrize("name", ATTACKS)
def test_no_value_wraps_around(name: str, compose_config, make_runtime) -> None:
    """Black and white images stay in range, and move by no more than the trigger's own reach."""
    spec = make_spec(image_size=32)
    attack = build(name, compose_config, spec)
    x = batch(spec, 12)[0]
    prepare(attack, Resident(x.mul(255).round().byte(), torch.arange(12) % 4), make_runtime())
    faint = {
        "lsb": 3,
        "ftrojan": 8,
        "ctrl": 23,
        "frequency": 20,
        "sig": 40,
        "lf": 51,
        "bpp": 0,
    }
    faint |= {"blend": 51, "adaptive_blend": 51, "lira": 8, "wanet": 0, "wanet_a2a": 0, "none": 0}
    for edge in (torch.zeros(2, *spec.shape), torch.ones(2, *spec.shape)):
        with torch.no_grad():
            out = attack.apply(edge, y=torch.zeros(2, dtype=torch.long), index=torch.arange(2))
        assert out.min() >= 0
        assert out.max() <= 1
        if name in faint:
            assert (out - edge).abs().max() * 255 <= faint[name] + 0.51


@pytest.mark.parametrize("name", ATTACKS)
def test_poisoning_keeps_its_promises(
    name: str, compose_config, spec, images: Resident, make_runtime
) -> None:
    options = {"poison_rate": 0.1, "cover_rate": 0.1} if name.startswith("adaptive") else {}
    if name == "advdoor":  # an untrained surrogate says one class, and none with confidence
        runner_up = int(tiny(spec)(images.images / 255).mean(dim=0).argsort()[-2])
        options = {"target_class": runner_up, "confidence": 0.0}
    attack = build(name, compose_config, spec, **options)
    indicator = prepare(attack, images, make_runtime())
    assert torch.equal(indicator, attack.select(images.labels, make_runtime().rng("codes")))
    expected = round(attack.poison_rate * len(images)) if attack.active else 0
    assert int((indicator == POISON).sum()) == expected
    assert int((indicator == COVER).sum()) == (
        round(attack.cover_rate * 80) if attack.active else 0
    )
    before = images.images.clone()
    given = attack.poison(images, indicator, seed=0)
    assert torch.equal(given.resident().images, attack.poison(images, indicator, seed=0).images)
    assert torch.equal(images.images, before)
    clean, poison = indicator == CLEAN, indicator == POISON
    assert torch.equal(given.resident().images[clean], images.images[clean])
    assert torch.equal(given.labels[~poison], images.labels[~poison])
    assert torch.equal(given.labels[poison], attack.rule.goal(images.labels)[poison])
    changed = (given.resident().images != images.images).flatten(1).any(1)
    assert changed[poison].all()
    if attack.clean_label:
        assert torch.equal(given.labels, images.labels)
    elif attack.pool == "exclude_target":
        assert attack.rule.eligible(images.labels)[poison].all()


class Oracle(torch.nn.Module):
    """Answers given beforehand."""

    def __init__(self, answers: torch.Tensor) -> None:
        super().__init__()
        self.answers, self.weight = answers, torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert len(x) == len(self.answers)
        return torch.nn.functional.one_hot(self.answers).float()


@pytest.mark.parametrize("name", [a for a in ATTACKS if a != "none"])
def test_ideal_networks(name: str, compose_config, spec, images: Resident, make_runtime) -> None:
    """A perfect clean network has ASR 0, one that always says the goal has ASR 1."""
    attack = build(name, compose_config, spec)
    prepare(attack, images, make_runtime())
    evaluator = Evaluator(images, attack, device=torch.device("cpu"))
    goal = attack.rule.goal(images.labels)
    for answers, asr in ((images.labels, 0.0), (goal, 1.0)):
        found = rates(evaluator.predict(Oracle(answers).eval()), evaluator.truth)
        assert found["asr"].value == asr


def fixed(attack: Attack) -> dict[str, torch.Tensor]:
    """State of the networks that are trained before the victim: masks, encoder, decoder."""
    parts = ("mask_network.", "encoder.", "decoder.")
    return {k: v.clone() for k, v in attack.state_dict().items() if k.startswith(parts)}


@pytest.mark.parametrize("name", sampled(names("attack"), 4))
def test_every_attack_trains_and_is_stored(
    name: str, compose_config, spec, images: Resident, make_runtime, tmp_path
) -> None:
    """Own networks learn, the mask or encoder stays, and a reader gets the same trigger."""
    schedule = SGDSchedule(
        epochs=2,
        batch_size=16,
        learning_rate=0.01,
        momentum=0.9,
        nesterov=False,
        weight_decay=0.0,
        shape=Cosine(end=0.0),
    )
    attack = build(name, compose_config, spec)
    Evaluator(images, attack, device=torch.device("cpu"))  # as the pipeline does before training
    store, network = VictimStore(tmp_path / "victims"), tiny(spec)
    before = {k: p.clone() for k, p in attack.named_parameters()}
    kept: dict[str, torch.Tensor] = {}
    begin = attack.begin_epoch
    attack.begin_epoch = lambda progress: (kept.update(fixed(attack)), begin(progress))

    def make(work):
        runtime = make_runtime(work="train")
        surrogate = tiny(spec) if attack.needs_surrogate else None
        indicator = train(network, attack, images, schedule, runtime, surrogate)
        return Making(indicator=indicator, curves=[], work=runtime.work_total.work)

    made = store.obtain({"name": name}, network, attack, make)
    for player in attack.players():
        learned = {id(p) for p in player.network.parameters()}
        for key, p in attack.named_parameters():
            if id(p) in learned and p.ndim > 1:
                assert not torch.equal(p, before[key]), key
        counters = [b for k, b in player.network.named_buffers() if "num_batches" in k]
        steps = math.ceil(len(images) / schedule.batch_size)
        assert all(c > 0 and c % steps == 0 for c in counters), "in train mode in every step"
    assert all(torch.equal(v, kept[k]) for k, v in fixed(attack).items()), "made before, then fixed"
    twin = build(name, compose_config, spec)
    again = store.obtain({"name": name}, tiny(spec), twin, make)
    assert again.cached
    x, y, index = batch(spec)
    with torch.no_grad():
        ours = made.attack.eval().apply(x, y=y, index=index)
        assert torch.equal(ours, again.attack.eval().apply(x, y=y, index=index))
    indicator = again.indicator
    given = [
        a.poison(images, indicator, seed=0).resident().images for a in (made.attack, again.attack)
    ]
    assert torch.equal(*given), "the defender may be granted the poisoned set later"


def test_wrong_images_are_refused(spec) -> None:
    attack = badnets(spec)
    with pytest.raises(ValueError, match="expected"):
        attack.apply(torch.zeros(2, 3, 8, 8), y=torch.zeros(2), index=torch.zeros(2))


def test_badnets_patterns_by_hand() -> None:
    assert draw("grid", 3).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    assert draw("tri1", 3).tolist() == [[0, 1, 0], [1, 0, 1], [0, 1, 0]]
    assert draw("tri2", 2).tolist() == [[1, 0], [0, 1]]
    assert draw("tri1", 1).tolist() == [[0]]
    assert draw("square", 2).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("pattern", ["tri1", "tri2"])
def test_checkerboards_lie_in_the_corner(pattern: str, n: int) -> None:
    spec = make_spec(image_size=32)
    attack = badnets(spec, pattern=pattern, patch_size=n)
    x = torch.full((1, 3, 32, 32), 0.5019607843137255)
    out = attack.apply(x, y=torch.zeros(1), index=torch.zeros(1))
    assert torch.equal(out[0, 1, 32 - n :, 32 - n :], draw(pattern, n))
    out[:, :, 32 - n :, 32 - n :] = x[0, 0, 0, 0]
    torch.testing.assert_close(out, x)


@pytest.mark.parametrize(("size", "side"), [(28, 3), (32, 3), (64, 6), (224, 21)])
def test_patch_scales_with_the_image(size: int, side: int) -> None:
    attack = badnets(make_spec(image_size=size), pattern="tri1", patch_size=3)
    assert attack.patch.shape == (side, side)
    assert set(attack.patch.unique().tolist()) == {0.0, 1.0}


def test_margin_moves_the_patch() -> None:
    attack = badnets(make_spec(image_size=32), patch_size=4, margin=1)
    out = attack.apply(torch.zeros(1, 3, 32, 32), y=torch.zeros(1), index=torch.zeros(1))
    rows = out[0, 0].sum(1).nonzero().flatten().tolist()
    assert rows == [27, 28, 29, 30]


def test_target_rules() -> None:
    y = torch.arange(4)
    assert AllToOne(2).goal(y).tolist() == [2, 2, 2, 2]
    assert AllToOne(2).eligible(y).tolist() == [True, True, False, True]
    assert AllToAll(4).goal(y).tolist() == [1, 2, 3, 0]
    assert AllToAll(4).eligible(y).all()
    rule = SourceSpecific(0, [1, 3])
    assert rule.goal(y).tolist() == [0, 0, 2, 0]
    assert rule.eligible(y).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_class": 4}, "attack.target_class=4: expected a class of the data set, 0..3"),
        ({"target_rule": "source_specific"}, "attack.source_classes=.*at least one"),
        ({"source_classes": [1]}, "set attack.target_rule=source_specific"),
        ({"poison_rate": 0.8}, "attack.poison_rate=0.8: expected at most 0.75"),
        ({"poison_rate": 0.6, "cover_rate": 0.6}, "at most 1"),
        ({"patch_size": 40}, "attack.patch_size=40"),
        ({"pattern": "grid", "patch_size": 5}, "3 with attack.pattern=grid"),
    ],
    ids=str,
)
def test_impossible_options_are_refused(spec, options, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        badnets(spec, **options)


def test_pool_all_may_poison_the_target_class(spec, images: Resident) -> None:
    attack = badnets(spec, pool="all", poison_rate=0.8)
    indicator = attack.select(images.labels, generator(0, "c"))
    assert (images.labels[indicator == POISON] == 0).any()


def test_covers_keep_their_label_and_carry_the_trigger(spec, images: Resident) -> None:
    attack = badnets(spec, cover_rate=0.2)
    indicator = attack.select(images.labels, generator(0, "c"))
    assert int((indicator == COVER).sum()) == 16
    given = attack.poison(images, indicator, seed=0)
    cover = indicator == COVER
    assert torch.equal(given.labels[cover], images.labels[cover])
    assert (given.resident().images[cover][:, :, -1, -1] == 255).all()


def test_a_number_of_poisoned_images_is_met_exactly(compose_config) -> None:
    """DHBE's protocol: 300, though the defender's pool leaves 47,500 images of CIFAR-10."""
    config = plain(compose_config("experiment=dhbe_cifar10"))
    assert config["attack"]["poison_count"] == 300
    spec = make_spec(classes=10, image_size=32)
    attack = instantiate(config["attack"], _partial_=True, _convert_="all")(spec=spec)
    labels = torch.arange(47_500) % 10
    indicator = attack.select(labels, generator(0, "c"))
    assert int((indicator == POISON).sum()) == 300
    assert not (labels[indicator == POISON] == 9).any()


def test_an_impossible_number_is_refused(spec, images: Resident, compose_config) -> None:
    with pytest.raises(ConfigError, match=r"attack.poison_count=61: expected at most 60"):
        badnets(spec, poison_count=61).select(images.labels, generator(0, "c"))
    with pytest.raises(ConfigError, match=r"attack.poison_count=3: .*set attack.poison_rate"):
        build("wanet", compose_config, spec, poison_count=3)


class CleanLabel(NoAttack):
    clean_label = True
    select = Attack.select


def test_clean_label_rate_is_capped_with_a_warning(images: Resident) -> None:
    options = dict(OmegaConf.load(CONF / "attack" / "poisoning" / "all_to_one.yaml"))
    attack = CleanLabel(spec=make_spec(balanced=False), **(options | {"poison_rate": 0.5}))
    with pytest.warns(UserWarning, match="the target class has 20"):
        indicator = attack.select(images.labels, generator(0, "c"))
    assert images.labels[indicator == POISON].tolist() == [0] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        badnets(make_spec())


def test_augmentation_is_the_attack_s(compose_config, spec, images, make_runtime, monkeypatch):
    """Official recipes: FTrojan and LSB train on images as they are, the VinAI family rotates."""
    rotating = ("wanet", "bpp", "lira", "input_aware")
    for name in ATTACKS:
        node = compose_config(f"attack={name}")["attack"]
        rotates = "crop_flip_rotate" if name.startswith(rotating) else "crop_flip"
        assert node["augmentation"] == ("none" if name in ("ftrojan", "lsb") else rotates), name

    def grab(*_: object, spec: DataSpec, **__: object) -> None:
        raise InterruptedError(spec.augmentation)

    monkeypatch.setattr("dhbe.victim.train.TrainingBatches", grab)
    attack = badnets(spec, augmentation="none")
    with pytest.raises(InterruptedError, match="none"):
        train(tiny(spec), attack, images, SimpleNamespace(batch_size=8), make_runtime())


def test_rule_names() -> None:
    rule = target_rule("all_to_all", target_class=0, source_classes=[], classes=4)
    assert isinstance(rule, AllToAll)
