"""Every config fits its component; every mistake is named before any work."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from dhbe.api import composed
from dhbe.config.identity import cell_name
from dhbe.config.schema import SUPPLIED, errors_in, plain, schema, validate
from dhbe.core.errors import BudgetError, ConfigError
from dhbe.experiment.assembly import assemble
from dhbe.training.schedule import SGDSchedule
from tests.conftest import CONF, ROOT, names, sampled

GROUPS = ("model", "attack", "defense", "budget", "trainer", "logger")


def test_the_shortcut_of_these_tests_composes_as_hydra_does(compose_config) -> None:
    """``compose_config`` chooses files and sets values in two steps."""
    words = ["scale=cpu", "attack=wanet", "defense=anp", "attack.poison_rate=0.05", "+x=[1,2]"]
    words += ["~attack.cover_rate", "paths.victims=v", "paths.results=r"]
    assert plain(compose_config(*words)) == composed(words)


def in_turn(groups: dict[str, list[str]]) -> list[dict[str, str]]:
    """Choices in which each name of each group occurs at least once."""
    longest = max(map(len, groups.values()))
    return [{g: n[i % len(n)] for g, n in groups.items()} for i in range(longest)]


def misfits(tree: dict[str, Any], groups: Iterable[str]) -> list[str]:
    """What is wrong with the options of these groups."""
    return [e for g in groups for e in errors_in(tree[g], g, frozenset(SUPPLIED.get(g, ())))]


@pytest.mark.parametrize(
    "chosen", sampled(in_turn({g: names(g) for g in GROUPS}), 2), ids=lambda c: "-".join(c.values())
)
def test_every_config_fits_its_component(chosen: dict[str, str], compose_config) -> None:
    required = {
        "attack=picture": "attack.path=trigger.png",
        "model=own": "model.factory=mynet.py:build",
        "model=timm": "model.name=resnet10t",
        "model=torchvision": "model.name=resnet18",
    }
    words = [f"{group}={name}" for group, name in chosen.items()]
    tree = plain(compose_config(*words, *(required[w] for w in words if w in required)))
    assert misfits(tree, GROUPS) == []
    assert misfits(tree | {"attack": tree["attack"] | {"wonder": 1}}, GROUPS), "it can fail"


@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_assembles(name: str, compose_config) -> None:
    parts = assemble(plain(compose_config(f"experiment={name}")))
    assert (parts.spec.name, parts.attack.active) == ("cifar10", True)


@pytest.mark.parametrize("name", names("victim"))
def test_every_schedule_fits(name: str, compose_config) -> None:
    needed = {
        "checkpoint": ["victim.path=x"],
        "finetune": ["victim.path=x"],
        "zoo": ["victim.name=x"],
    }
    extra = needed.get(name, [])
    victim = plain(compose_config(f"victim={name}", *extra))["victim"]
    assert errors_in(victim, "victim") == []


def test_the_published_protocol(compose_config) -> None:
    tree = plain(compose_config("experiment=dhbe_cifar10"))
    parts = assemble(tree)
    assert tree["victim"]["epochs"] == 200
    assert round(parts.attack.poison_rate * 50_000) == 300
    assert parts.defense.epochs * parts.defense.iterations == 15_000


def test_the_published_constants() -> None:
    """specs: batch 256, 300 x 50 iterations, 5 moves, lambdas, rates."""
    import yaml

    dhbe = yaml.safe_load((CONF / "defense" / "dhbe.yaml").read_text())
    assert (dhbe["batch_size"], dhbe["epochs"], dhbe["iterations"]) == (256, 300, 50)
    assert dhbe["weights"] == {
        "_target_": "dhbe.game.LossWeights",
        "patch": 0.1,
        "faint": 0.0,
        "tv1": 0.0,
        "tv2": 1e-4,
        "balance": 0.0,
        "statistics": 0.0,
    }
    assert dhbe["rates"]["student"] == 0.1
    assert dhbe["rates"]["milestones"] == [0.6, 0.8]
    assert (dhbe["latent"], dhbe["patch_latent"], dhbe["patch_size"]) == (256, 256, 5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack.poison_rate=abc", "attack.poison_rate=abc: Input should be a valid number"),
        ("attack.poison_rate=1.5", "attack.poison_rate=1.5: Input should be less than or equal"),
        ("defense.epochs=2.5", "defense.epochs=2.5: Input should be a valid integer"),
        ("attack.pattern=star", "Input should be 'square', 'grid', 'tri1' or 'tri2'"),
        ("+attack.ratio=0.1", r"attack.ratio=0.1: unknown; allowed are \[.*'poison_rate'"),
        ("~attack.margin", "attack.margin: missing"),
        ("data.std=[0.2]", r"data.std=\[0.2\]: expected one value per channel"),
        ("seed=-1", "seed=-1: expected an integer, 0 or more"),
        ("seed=zero", "seed=zero: expected an integer"),
        (
            "defense.weights.patch=much",
            "defense.weights.patch=much: Input should be a valid number",
        ),
        ("attack._target_=attacks.wanet.Typo", "attack._target_=attacks.wanet.Typo: cannot be"),
        ("victim=checkpoint", r"victim.path: required; set victim.path="),
        ("attack.target_class=10", "attack.target_class=10: expected a class of the data set"),
        ("attack.poison_rate=0.95", "attack.poison_rate=0.95: expected at most 0.9"),
        ("attack.patch_size=40", "attack.patch_size=40"),
        ("defense.patch_size=33", "defense.patch_size=33: expected at most"),
    ],
    ids=lambda x: x if "=" in x and " " not in x else "",
)
def test_mistakes_are_named(override: str, message: str, compose_config) -> None:
    with pytest.raises(ConfigError, match=message):
        assemble(plain(compose_config(override)))


def test_all_mistakes_at_once(compose_config) -> None:
    with pytest.raises(ConfigError) as error:
        validate(plain(compose_config("attack.poison_rate=2", "defense.epochs=0", "seed=-3")))
    assert len(str(error.value).splitlines()) == 3


def test_budget_too_small_is_a_config_error(compose_config) -> None:
    with pytest.raises(BudgetError, match="budget=none: FineTune needs clean images"):
        assemble(plain(compose_config("defense=finetune", "budget=none")))


def test_an_oracle_without_an_attack_is_refused(compose_config) -> None:
    choices = ("defense=anp", "defense.selection=oracle")
    with pytest.raises(ConfigError, match=r"defense\.selection=oracle: expected .*attack=none"):
        assemble(plain(compose_config(*choices, "attack=none")))
    assert assemble(plain(compose_config(*choices))).defense.selection == "oracle"


def test_a_defense_brings_its_budget_and_a_victim_switches_nothing(compose_config) -> None:
    assert compose_config("defense=finetune").budget.name == "pct5"
    assert compose_config("defense=finetune", "budget=pct1").budget.name == "pct1"
    plain_model, plain_attack = compose_config().model, compose_config().attack
    for victim in names("victim"):
        found = compose_config(f"victim={victim}")
        if victim != "zoo":  # whose victims bring both
            assert found.attack == plain_attack
        if victim not in ("finetune", "zoo"):  # a file tells the network, unless model= is said
            assert found.model == plain_model
    assert compose_config("victim=finetune").model._target_ == "dhbe.checkpoint.inferred"
    assert compose_config("victim=finetune", "model=resnet_tiny").model == plain_model


def test_cells_differ_by_what_matters(compose_config) -> None:
    def name(*overrides: str) -> str:
        return cell_name(plain(compose_config(*overrides)))

    assert name() == name()
    assert name() != name("seed=1")
    assert name() != name("defense.rates.student=0.5")
    assert name() == name("paths.data=/elsewhere", "trainer.progress=never", "force=true")
    assert name() == name("trainer.count=true"), "the same numbers"
    assert name() != name("trainer.compile=default"), "another rounding"
    assert name() == name("~trainer.compile", "~trainer.tf32", "~trainer.count"), "older cells"


def test_schema_reads_annotations() -> None:
    parameters = schema(SGDSchedule)
    assert parameters["epochs"].required
    assert set(parameters) >= {"epochs", "batch_size", "learning_rate", "shape"}


def test_a_cell_is_the_same_on_another_mount(
    compose_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(*overrides: str) -> str:
        return cell_name(plain(compose_config(*overrides)))

    for data in ("cifar10", "tiny_imagenet"):
        here, there = (name(f"data={data}", f"paths.data={p}") for p in ("/here", "/mnt/there"))
        assert here == there
    own = name("data=cifar10", "data.source.otherwise.root=/mine", "paths.data=/here")
    assert own != name("data=cifar10", "paths.data=/here"), "not the usual files"
    files = ["data=image_parquet", "data.classes=2", "data.source.train=a", "data.source.test=b"]
    assert name(*files, "paths.data=/here") != name(*files, "paths.data=/there"), "other images"
    folders = [name("data=image_folder", "data.classes=2", f"data.source.root=/{x}") for x in "ab"]
    assert len(set(folders)) == 2
    before = name("data=cifar10_mini")
    tree = plain(compose_config("data=cifar10_mini"))
    package = str(ROOT / "dhbe")
    tree["data"]["source"]["root"] = tree["data"]["source"]["root"].replace(package, "/x/dhbe")
    monkeypatch.setattr("dhbe.config.identity.PACKAGE", "/x/dhbe")
    assert cell_name(tree) == before


def patched(scale: str) -> dict[str, list[str]]:
    """What a scale knows of, by group."""
    folders = sorted(p for p in (CONF / "scale" / scale).iterdir() if p.is_dir())
    return {f.name: sorted(p.stem for p in f.glob("*.yaml")) for f in folders}


@pytest.mark.parametrize(
    ("scale", "chosen"),
    sampled([(s, c) for s in ("cpu", "quick") for c in in_turn(patched(s))], 8),
    ids=lambda x: x if isinstance(x, str) else "-".join(x.values()),
)
def test_every_patch_fits_and_changes_its_method(
    scale: str, chosen: dict[str, str], compose_config
) -> None:
    words = [f"{group}={name}" for group, name in chosen.items()]
    paper, changed = (plain(compose_config(*words, f"scale={s}")) for s in ("paper", scale))
    assert misfits(changed, chosen) == []
    assert not [group for group in chosen if changed[group] == paper[group]]


def test_what_a_scale_does_not_know_stays_as_published(compose_config) -> None:
    found = [compose_config("attack=blend", "defense=clp", f"scale={s}") for s in ("paper", "cpu")]
    assert plain(found[0]) == plain(found[1])


def test_the_command_line_and_experiments_win_over_the_scale(compose_config) -> None:
    found = compose_config("scale=cpu", "defense=dhbe", "defense.epochs=3", "attack=wanet")
    assert (found.defense.epochs, found.defense.iterations) == (3, 15)
    assert found.attack.poison_rate == 0.2
    assert (
        compose_config("scale=cpu", "attack=wanet", "attack.poison_rate=0.1").attack.poison_rate
        == 0.1
    )
    published = compose_config("experiment=dhbe_cifar10", "scale=cpu")
    assert (published.attack.poison_rate, published.defense.epochs) == (0.006, 20)


@pytest.mark.parametrize("scale", names("scale"))
def test_the_control_has_no_trigger_network_at_any_scale(scale: str, compose_config) -> None:
    dfad, dhbe = (
        plain(compose_config(f"defense={d}", f"scale={scale}"))["defense"] for d in ("dfad", "dhbe")
    )
    assert (dfad["patch_size"], dfad["weights"]["patch"], dfad["weights"]["tv2"]) == (0, 0.0, 0.0)
    idle = {"patch_size": None, "weights": None}
    assert dfad | idle == dhbe | idle, "the rest is DHBE's"
