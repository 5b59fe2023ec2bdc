"""``victim=zoo``: what was published comes back, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import dhbe
from dhbe.api import composed
from dhbe.config.resolution import resolved
from dhbe.config.schema import plain
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.experiment.pipeline import run
from dhbe.sweeping.publish import TITLE, index, publish
from dhbe.victim.zoo import CARD, PICTURE, WEIGHTS, Entry
from tests.conftest import ROOT

MADE = ("data.limit=200", "model.widths=[8,8]", "model.blocks=1", "victim.epochs=1", "seed=3")
QUIET = ("trainer.threads=1", "defense=none")
NAME = "cifar10_mini/resnet_tiny/badnets/3"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zoo with a clean and a backdoored network, and the results that they were made from."""
    folder = tmp_path_factory.mktemp("zoo")
    for attack in ("badnets", "none"):
        config = OmegaConf.create(composed([*MADE, *QUIET, f"attack={attack}"]))
        config.paths.victims = str(folder / "victims")
        choices = {"data": "cifar10_mini", "model": "resnet_tiny", "attack": attack}
        run(config, folder / "results" / attack, choices | {"defense": "none"})
    publish([folder / "results"], folder / "zoo")
    return folder


def choices_of(attack: str = "none") -> dict[str, str]:
    return {"data": "cifar10_mini", "model": "inferred", "attack": attack}


def zoo_config(zoo: Path, compose_config, *overrides: str, name: str = NAME):
    where = f"paths.zoo={zoo / 'zoo'}"
    return compose_config("victim=zoo", f"victim.name={name}", where, *QUIET, *overrides)


@pytest.mark.long
def test_the_figures_of_the_card_are_those_of_a_run(zoo: Path, compose_config, tmp_path) -> None:
    """Its attack, its clean network and its poisoned images come along; other images have none."""
    config = zoo_config(zoo, compose_config, "data.limit=200", "clean_baseline=true")
    metrics = run(config, tmp_path / "out", choices_of())
    card = Entry.read(zoo / "zoo", NAME).card
    assert metrics["attack"] == "badnets"
    assert metrics["counts"]["victim"]["acc"]["hits"] == card.acc.hits
    assert metrics["counts"]["victim"]["asr"]["hits"] == card.asr.hits
    clean = Entry.read(zoo / "zoo", "cifar10_mini/resnet_tiny/none/3").card
    assert clean.asr is None
    assert metrics["clean_baseline"]["acc"] == clean.acc.value
    assert metrics["poisoned"] == pytest.approx(0.1, abs=0.01)
    assert not metrics["notes"]
    other = zoo_config(zoo, compose_config, "data.limit=100")
    elsewhere = run(other, tmp_path / "b", choices_of())
    assert elsewhere["poisoned"] is None
    assert not elsewhere["notes"], "a defender without images has none that the victim knows"
    more = ("data.limit=100", "data.pool_fraction=0.2", "budget=pct5")
    granted = zoo_config(zoo, compose_config, *more)
    notes = " ".join(run(granted, tmp_path / "c", choices_of())["notes"])
    assert "may be among those that this victim was trained on" in notes
    assert "data.limit=100 cuts the training images, too: the defender has 5 clean ones" in notes


@pytest.mark.long
def test_a_second_publication_changes_nothing(zoo: Path) -> None:
    files = [f for f in (zoo / "zoo").rglob("*") if f.is_file()]
    assert {f.name for f in files} == {CARD, WEIGHTS, PICTURE}
    before = {f: f.stat().st_mtime_ns for f in files}
    assert len(publish([zoo / "results"], zoo / "zoo")) == 2
    assert {f: f.stat().st_mtime_ns for f in files} == before


def test_load_victim(zoo: Path) -> None:
    victim = dhbe.load_victim(NAME, zoo / "zoo")
    x = torch.rand(2, 3, 32, 32)
    assert victim.network(x).shape == (2, 10)
    stamped = victim.attack.apply(x, y=torch.tensor([1, 2]), index=torch.arange(2))
    assert not torch.equal(stamped, x)
    assert victim.measured["acc"] == Entry.read(zoo / "zoo", NAME).card.acc.value
    assert len(victim.indicator) == 190
    with pytest.raises(ConfigError, match=r"victim.name=none/such.*badnets/3"):
        dhbe.load_victim("none/such", zoo / "zoo")


@pytest.mark.parametrize(
    ("overrides", "chosen", "message"),
    [
        (("data=mnist",), {}, "data.channels=1: expected 3"),
        ((), {"attack": "blend"}, "attack=blend: expected that of the victim, badnets"),
        ((), {"model": "resnet18"}, "model=resnet18: expected that of the victim, resnet_tiny"),
        (("+attack.target_class=3",), {}, "attack=options"),
    ],
)
def test_what_contradicts_the_card_is_refused(
    zoo: Path, compose_config, overrides, chosen, message
) -> None:
    tree = plain(zoo_config(zoo, compose_config, *overrides))
    with pytest.raises(ConfigError) as refused:
        resolved(tree, choices_of() | chosen)
    assert message in str(refused.value)


@pytest.mark.parametrize("how", ["weights", "card"])
def test_what_was_edited_is_refused(how: str, zoo: Path, tmp_path: Path) -> None:
    entry = Entry.read(zoo / "zoo", NAME)
    copy = tmp_path / "zoo" / NAME
    copy.mkdir(parents=True)
    weights, card = (
        (entry.folder / WEIGHTS).read_bytes(),
        json.loads((entry.folder / CARD).read_text()),
    )
    if how == "weights":
        weights = weights[:-1] + bytes([weights[-1] ^ 1])
    else:
        card["acc"]["hits"] = -1
    (copy / WEIGHTS).write_bytes(weights)
    (copy / CARD).write_text(json.dumps(card))
    with pytest.raises(ArtefactError, match="SHA-256" if how == "weights" else "damaged card"):
        dhbe.load_victim(NAME, tmp_path / "zoo")


PUBLISHED = sorted(
    str(f.parent.relative_to(ROOT / "zoo")) for f in ROOT.glob(f"zoo/*/*/*/*/{CARD}")
)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_victims_of_the_repository_can_be_loaded(name: str) -> None:
    """Hashes are checked; each is worth something, or its card's rates would say so."""
    victim = dhbe.load_victim(name, ROOT / "zoo")
    assert Entry.read(ROOT / "zoo", name).card.name == name
    assert victim.network(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED[:1])
def test_they_are_checkpoints_like_others(name: str, compose_config) -> None:
    """The file tells the network, its normalisation and its classes."""
    file = ROOT / "zoo" / name / WEIGHTS
    config = compose_config("task=purify", f"checkpoint={file}", "defense=clp")
    tree, choices = resolved(plain(config), {"model": "inferred"})
    card = Entry.read(ROOT / "zoo", name).card
    assert tree["model"] == card.config["model"]
    assert choices["model"] == "airbench"
    assert tree["data"]["classes"] == 10
    assert tree["data"]["normalization"]["mean"] == pytest.approx(card.config["data"]["mean"])


def test_the_list_in_the_repository_is_that_of_the_cards() -> None:
    assert (ROOT / "zoo" / "README.md").read_text() == TITLE + index(ROOT / "zoo")
