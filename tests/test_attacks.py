"""The attack contract, over every attack config, and the rules behind it."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import CONF, make_spec, names
from hydra.utils import instantiate
from omegaconf import OmegaConf

from attacks.badnets import BadNets, draw
from dhbe.attack import Attack, NoAttack
from dhbe.config import plain
from dhbe.data import Resident
from dhbe.errors import ConfigError
from dhbe.rng import generator
from dhbe.targets import AllToAll, AllToOne, SourceSpecific, target_rule
from dhbe.types import CLEAN, COVER, POISON

ATTACKS = names("attack")


def build(name: str, compose_config, spec, **options) -> Attack:
    node = plain(compose_config(f"attack={name}"))["attack"] | options
    attack = instantiate(node, _partial_=True, _convert_="all")(spec=spec)
    assert isinstance(attack, Attack)
    return attack


def batch(spec, n: int = 5, seed: int = 0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (n, *spec.shape), generator=rng).float() / 255
    return x, torch.randint(0, spec.classes, (n,), generator=rng), torch.arange(n)


def badnets(spec, **options) -> BadNets:
    known = {
        "pattern": "square",
        "patch_size": 3,
        "margin": 0,
        "poison_rate": 0.1,
        "cover_rate": 0.0,
        "target_class": 0,
        "target_rule": "all_to_one",
        "source_classes": [],
        "pool": "exclude_target",
    }
    return BadNets(spec=spec, **(known | options))


def test_all_attacks_are_listed() -> None:
    assert ATTACKS == ["badnets", "none"]
    assert len(list((CONF.parent / "attacks").glob("[a-z]*.py"))) == len(ATTACKS) - 1  # none


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (224, 3)], ids=str)
def test_contract(name: str, size: int, channels: int, compose_config) -> None:
    spec = make_spec(image_size=size, channels=channels)
    attack = build(name, compose_config, spec).eval()
    for x, y, index in (batch(spec), batch(spec, 1), batch(spec, 3, seed=1)):
        before = x.clone()
        out = attack.apply(x, y=y, index=index)
        assert out.shape == x.shape
        assert out.min() >= 0
        assert out.max() <= 1
        torch.testing.assert_close(out * 255, (out * 255).round(), atol=1e-4, rtol=0)
        assert torch.equal(x, before), "the input must stay as it is"
        assert torch.equal(out, attack.apply(x, y=y, index=index)), "deterministic in eval mode"
    for edge in (torch.zeros(2, *spec.shape), torch.ones(2, *spec.shape)):
        out = attack.apply(edge, y=torch.zeros(2, dtype=torch.long), index=torch.arange(2))
        assert out.min() >= 0
        assert out.max() <= 1
    twin = build(name, compose_config, spec).eval()
    twin.load_state_dict(attack.state_dict())
    x, y, index = batch(spec)
    assert torch.equal(attack.apply(x, y=y, index=index), twin.apply(x, y=y, index=index))


@pytest.mark.parametrize("name", ATTACKS)
def test_poisoning_keeps_its_promises(name: str, compose_config, spec, images: Resident) -> None:
    attack = build(name, compose_config, spec)
    codes = attack.select(images.labels, generator(0, "codes"))
    assert torch.equal(codes, attack.select(images.labels, generator(0, "codes")))
    expected = round(attack.poison_rate * len(images)) if attack.active else 0
    assert int((codes == POISON).sum()) == expected
    before = images.images.clone()
    given = attack.poison(images, codes, seed=0)
    assert torch.equal(images.images, before)
    clean = codes == CLEAN
    assert torch.equal(given.resident().images[clean], images.images[clean])
    assert torch.equal(given.labels[clean], images.labels[clean])
    poison = codes == POISON
    assert torch.equal(given.labels[poison], attack.rule.goal(images.labels)[poison])
    assert attack.rule.eligible(images.labels)[poison].all()


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
    codes = attack.select(images.labels, generator(0, "c"))
    assert (images.labels[codes == POISON] == 0).any()


def test_covers_keep_their_label_and_carry_the_trigger(spec, images: Resident) -> None:
    attack = badnets(spec, cover_rate=0.2)
    codes = attack.select(images.labels, generator(0, "c"))
    assert int((codes == COVER).sum()) == 16
    given = attack.poison(images, codes, seed=0)
    cover = codes == COVER
    assert torch.equal(given.labels[cover], images.labels[cover])
    assert (given.resident().images[cover][:, :, -1, -1] == 255).all()


class CleanLabel(NoAttack):
    clean_label = True
    select = Attack.select


def test_clean_label_rate_is_capped_with_a_warning(images: Resident) -> None:
    options = dict(OmegaConf.load(CONF / "attack" / "common" / "poisoning.yaml"))
    attack = CleanLabel(spec=make_spec(balanced=False), **(options | {"poison_rate": 0.5}))
    with pytest.warns(UserWarning, match="the target class has 20"):
        codes = attack.select(images.labels, generator(0, "c"))
    assert images.labels[codes == POISON].tolist() == [0] * 20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        badnets(make_spec())


def test_rule_names() -> None:
    rule = target_rule("all_to_all", target_class=0, source_classes=[], classes=4)
    assert isinstance(rule, AllToAll)
