"""``victim=finetune`` starts from a file, is named by its content, and takes every attack."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dhbe.checkpoint import completed
from dhbe.config.identity import victim_recipe
from dhbe.config.resolution import resolved
from dhbe.config.schema import build as build_node
from dhbe.config.schema import plain
from dhbe.core.errors import ArtefactError, ConfigError
from dhbe.data import Resident, Splits
from dhbe.data.natural import natural_images
from dhbe.experiment.assembly import assemble
from dhbe.experiment.pipeline import run
from dhbe.models import Normalized
from dhbe.models.resnet import CifarResNet
from dhbe.report.collect import collect
from dhbe.training.schedule import Linear, SGDSchedule
from dhbe.victim.finetune import FinetunedVictim
from dhbe.victim.source import VictimRequest, no_attack
from tests.conftest import names, sampled
from tests.support.attacks import build, tiny
from tests.support.fixtures import make_spec, small

MODEL = {
    "_target_": "dhbe.models.resnet.SmallResNet",
    "widths": [16, 16],
    "blocks": 1,
    "stem_stride": 2,
}

NETWORK = ("model=resnet_tiny", "model.widths=[16,24]", "model.blocks=1")


def schedule(rate: float) -> SGDSchedule:
    return SGDSchedule(
        epochs=1,
        batch_size=16,
        learning_rate=rate,
        momentum=0.9,
        nesterov=False,
        weight_decay=5e-4,
        shape=Linear(),
    )


def source(file: Path, rate: float = 0.01) -> FinetunedVictim:
    return FinetunedVictim(path=str(file), key=None, sha256="", assumed=[], schedule=schedule(rate))


def config_network(classes: int) -> torch.nn.Module:
    """What ``MODEL`` is, for 32-pixel images."""
    torch.manual_seed(0)
    return build_node(MODEL, classes=classes, channels=3, image_size=32)


@pytest.fixture
def request_for(tmp_path: Path, images: Resident, make_runtime):
    """Function that asks for a victim of an attack, of the tiny data set."""
    nothing = torch.empty(0, dtype=torch.int64)
    splits = Splits(train=images, pool=images, test=images, train_index=nothing, pool_index=nothing)

    def asked(attack, name: str = "none", images: Splits | None = splits) -> VictimRequest:
        tree = {
            "data": {},
            "model": MODEL,
            "attack": {"of": name},
            "victim": {"of": name},
            "seed": 0,
        }
        return VictimRequest(
            config=tree | {"paths": {"victims": str(tmp_path / "victims")}},
            spec=attack.spec,
            attack=attack,
            splits=images,
            runtime=make_runtime(work=name),
        )

    return asked


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Somebody's plain state dict."""
    file = tmp_path / "given.pt"
    network = tiny(make_spec()).network
    with torch.no_grad():
        for value in network.parameters():
            value.add_(torch.rand(value.shape, generator=torch.Generator().manual_seed(5)))
    torch.save(network.state_dict(), file)
    return file


def test_it_starts_from_the_files_weights(given: Path, request_for) -> None:
    """At a rate below rounding every weight is the file's; at a real one, none."""
    weights = torch.load(given, weights_only=True)
    for rate, same in ((1e-30, True), (0.01, False)):
        request = request_for(no_attack(make_spec()), f"rate {rate}")
        victim = source(given, rate).obtain(request)
        assert not victim.cached
        found = dict(victim.network.network.named_parameters())
        assert found
        assert all(torch.equal(p, weights[k]) == same for k, p in found.items() if p.ndim > 1)


def test_attackers_look_into_the_given_network(given: Path, request_for) -> None:
    """Also where a surrogate is wanted: nothing is trained for it."""
    request = request_for(no_attack(make_spec()))
    weights = torch.load(given, weights_only=True)
    surrogate = source(given).surrogate(request)
    assert not surrogate.training
    for key, value in surrogate.network.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert not any(p.requires_grad for p in surrogate.parameters())


@pytest.mark.parametrize("name", sampled(names("attack"), 14))
def test_every_attack_is_planted(name: str, given: Path, request_for, compose_config) -> None:
    attack = build(name, compose_config, make_spec())
    weights = torch.load(given, weights_only=True)
    request = request_for(attack, name)
    victim = source(given).obtain(request)
    moved = dict(victim.network.network.named_parameters())["head.weight"]
    assert not torch.equal(moved, weights["head.weight"])
    assert source(given).obtain(request).cached
    if attack.active and attack.poison_rate > 0.01:  # less is none of 80 images
        assert (victim.indicator != 0).any()


def test_the_files_content_names_the_victim_not_its_place(tmp_path: Path, compose_config) -> None:
    """The same command on a replaced file computes anew; a moved file is the same victim."""

    def named(file: Path, seed: int) -> tuple[str, dict]:
        file.parent.mkdir(exist_ok=True)
        torch.save(small(seed).network.state_dict(), file)
        tree, _ = resolved(plain(compose_config(*options(file, *NETWORK))), {})
        recipe = victim_recipe(tree, attacked=True, images="", precision="", tf32=False)
        return tree["victim"]["sha256"], recipe

    first = named(tmp_path / "a" / "w.pt", 1)
    assert named(tmp_path / "a" / "w.pt", 1) == first
    assert named(tmp_path / "b" / "w.pt", 1) == first
    replaced = named(tmp_path / "a" / "w.pt", 2)
    assert replaced[0] != first[0]
    assert replaced[1] != first[1]


def options(file: Path, *more: str) -> tuple[str, ...]:
    sizes = ("data.classes=4", "data.image_size=16", "data.train_size=0")
    return ("victim=finetune", f"victim.path={file}", *sizes, "attack=blend", "defense=none", *more)


def test_network_and_normalisation_are_the_files(tmp_path: Path, compose_config) -> None:
    """Of a file of this project, which brings its statistics; ``model=`` is not needed."""
    file = tmp_path / "w.safetensors"
    network = small(1)
    network.mean.fill_(0.3)
    save_file(network.state_dict(), file, metadata={"stem_stride": "2"})
    tree, choices = resolved(plain(compose_config(*options(file))), {})
    assert choices["model"] == "resnet_small"
    assert tree["data"]["mean"] == pytest.approx([0.3] * 3)
    assert any("the file's own first layer" in note for note in tree["victim"]["assumed"])
    assert assemble(tree).source.assumed == tree["victim"]["assumed"]


def test_a_run_from_the_file_to_the_report(tmp_path: Path, compose_config) -> None:
    """``model=`` unsaid; what was found out stands in the result, and the victim is stored once."""
    file = tmp_path / "w.safetensors"
    network = Normalized(config_network(10), make_spec(classes=10, image_size=32))
    save_file(network.state_dict(), file, metadata={"stem_stride": "2"})
    more = ("data.limit=300", "data.train_size=0", "victim.schedule.epochs=1", "trainer.threads=1")
    task = ("victim=finetune", f"victim.path={file}", "attack=blend", *more)
    cached = []
    for defense in ("none", "clp"):
        folder = tmp_path / "results" / defense
        choices = {"data": "cifar10_mini", "attack": "blend", "defense": defense, "scale": "quick"}
        found = run(compose_config(*task, f"defense={defense}"), folder, choices)
        assert found["model"] == "resnet_small"
        assert any("the file's own first layer" in note for note in found["notes"])
        cached.append(found["cached_victim"])
    assert cached == [False, True]
    table = collect([tmp_path / "results"])
    assert table["epochs"].tolist() == [1, 1]
    assert table["case"].nunique() == 1


@pytest.mark.long
@torch.no_grad()
def test_nearly_the_data_sets_normalisation_is_told_apart(tmp_path: Path, compose_config) -> None:
    """ImageNet's statistics and CIFAR-10's are close; a network that saw many images knows."""
    images = natural_images(3, 32, 1000)
    assert images is not None
    torch.manual_seed(0)
    network = CifarResNet(widths=[8, 16], blocks=1, classes=10, channels=3, image_size=32)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for mean, std, replaced in (
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True),
        ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201), False),
    ):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        center, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
        network.train()((images - center) / spread)
        torch.save(network.state_dict(), tmp_path / "w.pt")
        task = ("victim=finetune", f"victim.path={tmp_path}/w.pt", "data=cifar10")
        tree, _ = completed(plain(compose_config(*task)), {})
        assert tree["data"]["mean"] == pytest.approx(mean)
        assert tree["data"]["std"] == pytest.approx(std)
        said = [n for n in tree["victim"]["assumed"] if "instead of the data set's" in n]
        assert len(said) == replaced


def test_what_cannot_be_is_refused(
    tmp_path: Path, given: Path, request_for, compose_config
) -> None:
    with pytest.raises(ConfigError, match=r"victim\.path: required"):
        assemble(plain(compose_config("victim=finetune")))
    attack = no_attack(make_spec())
    with pytest.raises(ConfigError, match="data=tiny: expected a data set to train on"):
        source(given).obtain(request_for(attack, "nothing", None))
    other = tmp_path / "other.pt"
    torch.save(small(1).network.state_dict(), other)
    with pytest.raises(ArtefactError, match="do not fit the network"):
        source(other).obtain(request_for(attack))
    ten = ("data=cifar10_mini", "victim=finetune", f"victim.path={other}")
    with pytest.raises(ArtefactError, match=r"head\.weight is \(4, 24\), expected \(10, 24\)"):
        completed(plain(compose_config(*ten)), {})
    kept = tmp_path / "results" / "out"
    kept.mkdir(parents=True)
    torch.save(small(1).network.state_dict(), kept / "w.pt")
    with pytest.raises(ConfigError, match="inside the result folder"):
        run(compose_config(*options(kept / "w.pt", *NETWORK)), kept, {})
