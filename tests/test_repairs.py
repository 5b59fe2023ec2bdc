"""Each defense on a toy victim: the backdoor goes, a clean network stays."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from dhbe.core.rng import generator
from dhbe.core.types import Suspect
from dhbe.data import Budget, DefenderData, Resident
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.metrics import rates
from dhbe.methods.unlearning import unlearn
from dhbe.models import Normalized
from dhbe.training.schedule import Cosine, OneCycle, SGDSchedule
from dhbe.victim.train import train
from tests.conftest import names, tiered
from tests.support.attacks import badnets, tiny
from tests.support.fixtures import make_spec


def steep() -> SGDSchedule:
    """Five epochs at rate 1."""
    return SGDSchedule(
        epochs=5,
        batch_size=32,
        learning_rate=1.0,
        momentum=0.9,
        nesterov=False,
        weight_decay=0,
        shape=Cosine(end=0.0),
    )


@pytest.mark.long
def test_unlearning_stops_in_the_middle_of_an_epoch(toys, make_runtime) -> None:
    clean, _, _, given, _ = toys
    network, runtime = copy.deepcopy(clean), make_runtime()
    schedule = steep()
    reached = unlearn(network, given, schedule, runtime, stop_accuracy=0.4, clip=20.0)
    assert reached <= 0.4
    state = torch.load(runtime.workdir / "unlearn" / "last.ckpt", weights_only=True)
    assert state["global_step"] % 37 > 0, "37 batches are an epoch"


def test_unlearning_that_was_done_is_not_done_again(toys, make_runtime) -> None:
    """A run killed in a later stage comes back to the same network."""
    clean, _, _, given, _ = toys
    schedule = steep()
    first, again = copy.deepcopy(clean), copy.deepcopy(clean)
    reached = [
        unlearn(n, given, schedule, make_runtime(), stop_accuracy=0.4, clip=20.0)
        for n in (first, again)
    ]
    assert reached[0] == reached[1]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in first.state_dict().items())


def toy(count: int, seed: int) -> Resident:
    """Four classes of coloured stripes under noise: a task that a tiny network learns at once."""
    rng = generator(seed)
    labels = torch.arange(count) % 4
    at = torch.arange(16)
    stripes = torch.stack([((at // w) % 2).float() for w in (1, 2, 4, 8)])  # (4, 16)
    x = 0.25 + 0.35 * stripes[labels][:, None, None, :].expand(-1, 3, 16, -1)
    x = x + 0.15 * torch.randn(x.shape, generator=rng)
    return Resident(x.clamp(0, 1).mul(255).byte(), labels)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """(clean network, backdoored network, attack, training set, test set)."""
    from dhbe.training.runtime import Runtime
    from dhbe.training.trainer import TrainerConfig

    spec = make_spec(flip=False, crop_padding=0)
    config = TrainerConfig(
        device="cpu", precision="32-true", threads=0, progress="never", observe_every=0
    )
    schedule = SGDSchedule(
        epochs=4,
        batch_size=32,
        learning_rate=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        shape=OneCycle(),
    )
    given, test = toy(1200, 0), toy(400, 1)
    attack = badnets(spec, poison_rate=0.1, patch_size=8)
    networks = []
    for name, rate in (("clean", 0.0), ("backdoored", 0.1)):
        runtime = Runtime(
            trainer_config=config, seed=0, workdir=tmp_path_factory.mktemp("toy") / name
        )
        network = tiny(spec).train()
        train(network, badnets(spec, poison_rate=rate, patch_size=8), given, schedule, runtime)
        networks.append(network.eval())
    return (*networks, attack, given, test)


def measured(network: Normalized, attack, test: Resident) -> tuple[float, float]:
    found = rates(
        (e := Evaluator(test, attack, device=torch.device("cpu"))).predict(network.eval()), e.truth
    )
    return found["acc"].value, found["asr"].value


def test_the_toy_victim_is_backdoored(toys) -> None:
    clean, backdoored, attack, _, test = toys
    assert measured(clean, attack, test)[0] > 0.97
    assert measured(clean, attack, test)[1] < 0.1
    assert measured(backdoored, attack, test)[0] > 0.97
    assert measured(backdoored, attack, test)[1] > 0.97


SPARED = ("dhbe", "dfad", "abl", "none")
QUICK = ("clp", "ft_sam")


@pytest.mark.parametrize(
    "name", tiered([d for d in names("defense") if not d.startswith(SPARED)], QUICK.__contains__)
)
def test_a_clean_network_keeps_its_accuracy(name: str, compose_config, toys, make_runtime) -> None:
    """Within 3 points, with a few real steps of every method."""
    clean, _, attack, given, test = toys
    quick = {
        "nad": {"betas": [50.0, 50.0]},
        "awm_one_shot": {"copies": 1},
        "pbe": {"shares": [0.3]},
    }
    defense = repairing(name, compose_config, quick.get(name, {}))
    repaired = defense(
        Suspect(network=clean, architecture="toy", spec=clean.spec),
        toy_data(attack, given),
        make_runtime(),
    )
    before, after = (measured(n, attack, test)[0] for n in (clean, repaired))
    assert after >= before - 0.03


def toy_data(attack, given: Resident) -> DefenderData:
    indicator = attack.select(given.labels, generator(0, "codes"))
    return DefenderData(
        Budget(name="toy", fraction=0.1, poisoned=True, incoming=6),
        pool=toy(400, 2),
        train_size=2000,
        seed=0,
        poisoned=attack.poison(given, indicator, seed=0).resident(),
        trigger=lambda x, y, index: attack.apply(x, y=y, index=index),
    )


def repairing(name: str, compose_config, options):
    """A defense with enough steps to do something on the toy."""
    from hydra.utils import instantiate

    from dhbe.config.schema import plain

    node = plain(compose_config(f"defense={name}"))["defense"] | options

    def lengths(part):
        small = {"epochs": 4, "steps": 30, "batch_size": 32, "generations": 5, "inputs": 4}
        small |= {"population": 12, "verification": 40}
        small |= {"count": 64, "judged": 24, "per_class": 4}
        if not isinstance(part, dict):
            return part
        return {k: small.get(k, lengths(v)) for k, v in part.items()}

    return instantiate(lengths(node), _convert_="all")


@pytest.mark.parametrize(
    "name",
    tiered(
        ["anp", "awm", "fine_pruning", "neural_cleanse", "rnp", "trap_and_replace"],
        ("fine_pruning", "rnp").__contains__,
    ),
)
def test_the_toy_backdoor_goes(name: str, compose_config, toys, make_runtime) -> None:
    """These need few steps for it; the others are measured on CIFAR-10 (docs/results)."""
    _, backdoored, attack, given, test = toys
    victim = Suspect(network=backdoored, architecture="toy", spec=backdoored.spec)
    defense = repairing(name, compose_config, {})
    acc, asr = measured(defense(victim, toy_data(attack, given), make_runtime()), attack, test)
    assert acc > 0.95
    assert asr < 0.5


@pytest.mark.long
def test_a_told_target_is_denied(compose_config, toys, make_runtime) -> None:
    """Where it was said, whatever the real trigger looks like within its family."""
    _, backdoored, attack, given, test = toys
    network, runtime = copy.deepcopy(backdoored), make_runtime()
    defense = repairing("scan_unlearn", compose_config, {"weight": 2.0, "share": 1.0})
    defense.schedule = replace(defense.schedule, epochs=12)
    x = runtime.tensor(given.subset(torch.arange(1200)[given.labels != 0][:256]))
    kinds = defense.scan.families(network.spec)["patch"]
    defense.unlearn(network.requires_grad_(False), x, 0, kinds, runtime)
    acc, asr = measured(network, attack, test)
    assert acc > 0.95
    assert asr < 0.5


@pytest.mark.parametrize("name", tiered(["neural_cleanse", "cetf"], "cetf".__eq__))
def test_detectors_name_the_target_class(name: str, compose_config, toys, make_runtime) -> None:
    """The true one, and none of a clean network."""
    clean, backdoored, attack, given, _ = toys
    options = {"outlier": 1.2} if name == "neural_cleanse" else {}  # MAD of four classes is coarse
    for network, expected in ((backdoored, [0]), (clean, [])):
        runtime = make_runtime(work=str(expected))
        defense = repairing(name, compose_config, options)
        if name == "neural_cleanse":
            defense.epochs = 25  # until masks have shrunk as far as they can
        victim = Suspect(network=network, architecture="toy", spec=network.spec)
        defense(victim, toy_data(attack, given), runtime)
        assert runtime.recorder.suspected == expected
