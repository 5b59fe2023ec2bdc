"""``victim=zoo`` and ``dhbe.load_victim(name)``: victims made beforehand, with a card each.

A victim is a folder, ``<zoo>/<data>/<model>/<attack>/<seed>``, with ``victim.safetensors`` (the
network in float16, the attack's state, the poison indicator), ``card.json`` (recipe, rates with
counts, SHA-256 of the weights) and ``trigger.png``. Nothing is downloaded or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dhbe.checkpoint.nesting import STATISTICS
from dhbe.checkpoint.recognition import sizes
from dhbe.checkpoint.writing import untold
from dhbe.config import schema as config
from dhbe.contracts.attack import Attack
from dhbe.core.errors import ArtefactError, got
from dhbe.core.paths import ROOT
from dhbe.core.types import DataSpec
from dhbe.evaluation.metrics import Rate
from dhbe.models import Normalized
from dhbe.victim.source import VictimRequest, VictimSource, build_network
from dhbe.victim.store import INDICATOR, Victim

CARD, WEIGHTS, PICTURE = "card.json", "victim.safetensors", "trigger.png"
PARTS = ("data", "model", "attack", "victim", "seed")
"""Of a run's config, kept in a card."""
NAMED = ("data", "model", "attack")
"""Config groups whose choices, with the seed, name a victim."""


@checked(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Card:
    """What is known of a victim of the zoo.

    Attributes:
        sha256: of the weights.
        choices: name of the chosen config of data, model and attack.
        config: the options behind them, of ``victim`` (the training), and its seed.
        images: fingerprint of the training images.
        acc, asr: of the weights as they are stored; ``asr`` is None of clean networks.
        seconds: of the training.
    """

    sha256: str
    choices: dict[str, str]
    config: dict[str, Any]
    images: str
    acc: Rate
    asr: Rate | None
    seconds: float
    precision: str
    commit: str | None
    versions: dict[str, str]

    @property
    def name(self) -> str:
        """In the zoo."""
        return name_of(self.choices, self.config["seed"])


CARDS = TypeAdapter(Card)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A victim's folder and its card."""

    folder: Path
    card: Card

    @classmethod
    def read(cls, zoo: Path, name: str) -> Entry:
        """The entry of this name.

        Raises:
            ConfigError: the zoo has none; lists those it has.
            ArtefactError: the card is damaged.
        """
        folder = zoo / name
        if not (folder / CARD).is_file():
            there = sorted(str(f.parent.relative_to(zoo)) for f in zoo.glob(f"*/*/*/*/{CARD}"))
            raise got("victim.name", name, f"a victim of {zoo}: {', '.join(there) or 'none there'}")
        try:
            card = CARDS.validate_json((folder / CARD).read_text())
        except (OSError, ValidationError) as error:
            raise ArtefactError(f"{folder / CARD}: damaged card ({error})") from error
        return cls(folder=folder, card=card)

    def write(self, network: Normalized, attack: Attack, indicator: Tensor) -> Entry:
        """Store weights, poison indicator (N,) and card; returns the entry with the hash."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {INDICATOR: indicator.cpu()}
        for part, module in (("network", network), ("attack", attack)):
            own = rounded(module.state_dict()) if module is network else module.state_dict()
            tensors |= {f"{part}.{k}": v.cpu().contiguous().clone() for k, v in own.items()}
        save_file(tensors, self.folder / WEIGHTS, metadata=untold(self.card.config))
        sha256 = hashlib.sha256((self.folder / WEIGHTS).read_bytes()).hexdigest()
        told = CARDS.dump_python(self.card, mode="json") | {"sha256": sha256}
        (self.folder / CARD).write_text(json.dumps(told, indent=1) + "\n")
        return Entry(folder=self.folder, card=CARDS.validate_python(told))

    def fill(self, network: Normalized, attack: Attack) -> Tensor:
        """Give both, freshly built, the victim's state; returns the poison indicator (N,).

        Raises:
            ArtefactError: the weights are missing, damaged, or not the card's.
        """
        file = self.folder / WEIGHTS
        try:
            found = hashlib.sha256(file.read_bytes()).hexdigest()
            if found != self.card.sha256:
                raise ArtefactError(f"{file}: SHA-256 {found}, but its card says otherwise")
            tensors = load_file(file)
            for part, module in (("network", network), ("attack", attack)):
                start = f"{part}."
                own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
                module.load_state_dict(own)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ArtefactError(f"{file}: cannot be read ({error})") from error
        return tensors[INDICATOR]


def name_of(choices: Mapping[str, str], seed: int) -> str:
    """Name of a victim in the zoo."""
    return "/".join([*(choices[group] for group in NAMED), str(seed)])


def rounded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A network's state, in the same shapes, in float16 but for the normalisation."""
    return {
        k: v.half() if v.is_floating_point() and k not in STATISTICS else v
        for k, v in state.items()
    }


def zoo_folder(given: str | None) -> Path:
    """The zoo that ``paths.zoo`` or DHBE_ZOO names, else the checkout's."""
    return Path(given or os.environ.get("DHBE_ZOO") or ROOT / "zoo")


def completed(
    tree: dict[str, Any], choices: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fill in network, attack and normalisation from the victim's card.

    Raises:
        ConfigError: no such victim; or the config asks for another network, attack or image size.
    """
    name = tree["victim"]["name"]
    if name == "???":
        raise got("victim.name", "not set", "the name of a victim, such as victim.name=cifar10/...")
    card = Entry.read(zoo_folder(tree["paths"]["zoo"]), name).card
    for group, open_ in (("model", "inferred"), ("attack", "none")):
        if choices.get(group, open_) not in (open_, card.choices[group]):
            raise got(group, choices[group], f"that of the victim, {card.choices[group]}")
    if tree["attack"] is not None:
        raise got("attack", "options", "none: those of the victim are part of it")
    kept = card.config
    for size, wanted in sizes(kept["data"]).items():
        if tree["data"].get(size) != wanted:
            allowed = f"{wanted} as the victim has it, such as data={kept['data']['name']}"
            raise got(f"data.{size}", tree["data"].get(size), allowed)
    data = tree["data"] | {k: kept["data"][k] for k in STATISTICS}
    victim = tree["victim"] | {"sha256": card.sha256}
    filled = {"data": data, "model": kept["model"], "attack": kept["attack"], "victim": victim}
    return tree | filled, dict(choices) | {g: card.choices[g] for g in ("model", "attack")}


class ZooVictim(VictimSource):
    """A victim of the zoo; its attack comes with it, whatever it was made from.

    Args:
        name: ``<data>/<model>/<attack>/<seed>``.
        sha256: of its weights; filled in from the card: other weights are another victim.
    """

    trains = True
    weights_only = False

    def __init__(self, *, name: str, sha256: str) -> None:
        self.name, self.sha256 = name, sha256

    def check(self, attack: Attack) -> None:
        """The attack is the card's."""

    def obtain(self, request: VictimRequest) -> Victim:
        """The victim; its poison indicator only beside the images that it was trained on.

        Without the attack it is the clean network of the same name, that it was made from.

        Raises:
            ArtefactError: the zoo's victim is damaged, or not the one that the config names.
        """
        name = self.name
        if not request.attack.active:
            data, model, _, seed = name.split("/")
            name = f"{data}/{model}/none/{seed}"
        entry = Entry.read(zoo_folder(request.config["paths"]["zoo"]), name)
        if name == self.name and entry.card.sha256 != self.sha256:
            raise ArtefactError(f"{entry.folder}: not the victim of this config, {self.sha256}")
        same = request.splits is not None and (
            request.splits.train.fingerprint() == entry.card.images
        )
        budget = request.config["budget"]
        if not same and any(budget.get(k) for k in ("fraction", "per_class", "incoming")):
            data = entry.card.choices["data"]
            self.assumed = [
                "the defender's clean images may be among those that this victim was trained on; "
                f"data={data} without data.limit keeps them apart"
            ]
        return victim(entry, request.network(), request.attack, poisoned=same)


def victim(entry: Entry, network: Normalized, attack: Attack, *, poisoned: bool) -> Victim:
    """The entry's victim in freshly built parts, in eval mode."""
    indicator = entry.fill(network, attack)
    card = entry.card
    rates = {"acc": card.acc, "asr": card.asr}
    return Victim(
        network=network.eval(),
        attack=attack.eval(),
        indicator=indicator if poisoned else indicator[:0],
        seconds=card.seconds,
        cached=True,
        curves=[],
        work=None,
        measured={k: v.value for k, v in rates.items() if v is not None and v.value is not None},
        sha256=card.sha256,
    )


def load_victim(name: str, zoo: str | Path | None = None) -> Victim:
    """A victim of the zoo: ``load_victim("cifar10/airbench_half/badnets/0")``.

    Its ``network`` maps pixels (B, C, H, W) in [0, 1] to logits (B, classes); ``attack.apply(x, y=,
    index=)`` puts the trigger on images; ``measured`` has ACC and ASR.

    Args:
        zoo: folder of victims; None: DHBE_ZOO, else that of the checkout.

    Raises:
        ConfigError: no such victim.
        ArtefactError: it is damaged.
    """
    entry = Entry.read(zoo_folder(None if zoo is None else str(zoo)), name)
    tree = entry.card.config
    data = {f.name: tree["data"][f.name] for f in fields(DataSpec) if f.name in tree["data"]}
    spec = DataSpec(**data | {k: tuple(data[k]) for k in STATISTICS})
    attack: Attack = config.build(tree["attack"], spec=spec)
    with torch.random.fork_rng(devices=[]):
        network = build_network(tree, spec, seed=0)
    return victim(entry, network, attack, poisoned=True)
