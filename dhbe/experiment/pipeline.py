"""One run: config, data, attack, victim, suspect, defense, evaluation, result folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from safetensors.torch import save_file
from torch import nn

from dhbe.checkpoint import CheckpointFile, completed
from dhbe.checkpoint.inference import TARGET as CHECKPOINT
from dhbe.checkpoint.loading import UNWRITTEN
from dhbe.checkpoint.recognition import OWN
from dhbe.config import identity
from dhbe.config import schema as config
from dhbe.contracts.attack import Attack, NoAttack
from dhbe.contracts.defense import Defense
from dhbe.core.errors import ArtefactError, ConfigError, got
from dhbe.core.rng import fork
from dhbe.core.types import POISON, DataSpec, Suspect
from dhbe.data import Budget, Data, DefenderData, OwnImages, Splits
from dhbe.evaluation.evaluator import Evaluator
from dhbe.evaluation.evidence import Evidence, Probe
from dhbe.evaluation.metrics import Predictions, Truth
from dhbe.experiment import results
from dhbe.experiment.results import Clock, ResultFolder
from dhbe.experiment.tracking import report, tracked
from dhbe.models import Normalized
from dhbe.models.interface import channels_last, prepared
from dhbe.report.console import show
from dhbe.report.page import write_page
from dhbe.report.picture import write_overview
from dhbe.training import parallel as processes
from dhbe.training import work as counting
from dhbe.training.recorder import Recorder, Stopwatch
from dhbe.training.runtime import Runtime
from dhbe.training.schedule import Schedule
from dhbe.training.trainer import TrainerConfig
from dhbe.victim import store as victim
from dhbe.victim.train import train

log = logging.getLogger(__name__)
EXAMPLES = 8
"""Test images shown in the report."""
VICTIM_KEYS = ("data", "model", "attack", "victim", "seed")
"""Config groups that make a victim, besides the precision; they and no others name it."""


@dataclass(kw_only=True)
class Given:
    """A network in memory that takes the place of a trained victim."""

    network: nn.Module
    assumed: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class Parts:
    """The objects that a config names."""

    data: Data
    attack: Attack
    defense: Defense
    budget: Budget
    trainer: TrainerConfig
    victim: Schedule | CheckpointFile | Given
    probe: Probe | None

    @property
    def spec(self) -> DataSpec:
        """What everyone may know of the data."""
        return self.data.spec


def assemble(tree: dict[str, Any]) -> Parts:
    """Build all parts and check that they fit; nothing is read from disk.

    Raises:
        ConfigError: unknown, ill-typed or missing values, or an impossible combination.
    """
    config.validate(tree)
    data: Data = config.build(tree["data"])
    budget: Budget = config.build(tree["budget"])
    defense: Defense = config.build(tree["defense"])
    defense.check(budget)
    defense.fits(data.spec)
    attack: Attack = config.build(tree["attack"], spec=data.spec)
    if defense.selection == "oracle" and not attack.active:
        allowed = "fixed or validation with attack=none: an oracle reads the attack's success rate"
        raise got("defense.selection", "oracle", allowed)
    if tree["victim"]["_target_"] == CHECKPOINT and attack.active and not attack.portable:
        raise got(
            "attack",
            tree["attack"]["_target_"],
            "an attack whose trigger its options tell; this one's is made together with a victim, "
            "and a checkpoint does not bring it",
            "trigger=PICTURE stands for a known trigger",
        )
    defense.weights_only = tree["victim"]["_target_"] == CHECKPOINT
    return Parts(
        data=data,
        attack=attack,
        defense=defense,
        budget=budget,
        trainer=config.build(tree["trainer"]),
        victim=config.build(tree["victim"]),
        probe=config.build(tree["probe"]) if "probe" in tree else None,
    )


def build_network(tree: dict[str, Any], spec: DataSpec, seed: int) -> Normalized:
    """Freshly initialised network with normalisation, channels last in memory."""
    with fork(seed):
        network: nn.Module = config.build(
            tree["model"],
            classes=spec.classes,
            channels=spec.channels,
            image_size=spec.image_size,
        )
    if tree["model"]["_target_"] == OWN:
        prepared(network, spec)
    return channels_last(Normalized(network, spec))


def run(cfg: DictConfig, folder: Path, choices: Mapping[str, str]) -> dict[str, Any]:
    """Carry out one run and return its metrics; a finished folder of the same config is reused.

    Args:
        folder: where the result goes.
        choices: name of the chosen config in each group, for tables.
    """
    tree = config.plain(cfg)
    result = ResultFolder(folder)
    try:
        tree, choices = completed(tree, choices)
        parts = assemble(tree)
        if isinstance(parts.victim, CheckpointFile):
            parts.victim.outside(folder)
        trainer = parts.trainer
        processes.refuse_multirun(trainer.processes)
        if result.complete and not tree["force"] and not processes.started():
            return reuse(result, tree)
        if trainer.processes > 1 and not processes.started():
            processes.launch(trainer.processes)
            return result.metrics(identity.cell(tree))
        with processes.group(trainer.processes, trainer.device), result.claimed():
            if processes.agree(result.complete and not tree["force"]):
                return reuse(result, tree)
            with tracked(tree, choices, result.partial) as logger:
                metrics, _ = compute(tree, parts, result, choices, logger)
            if processes.first():
                show(metrics, result.path)
            return metrics
    finally:
        result.discard_empty()


def compute(
    tree: dict[str, Any],
    parts: Parts,
    result: ResultFolder,
    choices: Mapping[str, str],
    logger: Logger | None,
) -> tuple[dict[str, Any], Normalized]:
    """The run itself, into ``result``: its metrics and the purified network."""
    seed, device = tree["seed"], parts.trainer.device
    parts.trainer.apply()
    cell = identity.cell(tree)
    work = result.open(cell)
    clock = Clock(device)
    splits = load(parts.data, identity.fingerprint(tree["data"]))

    evaluator = None
    if splits is not None and len(splits.test):
        attack = parts.attack if parts.attack.active else None
        evaluator = Evaluator(splits.test, attack, device=device)
    watch = None if evaluator is None else evaluator.observer()
    runtime = Runtime(
        trainer_config=parts.trainer,
        seed=seed,
        workdir=work / "training",
        recorder=Recorder(watch, parts.trainer.observe_every),
        logger=logger,
    )
    with clock.stage("victim"):
        made = obtain_victim(tree, parts, parts.attack, splits, runtime)
    made.network.to(device, runtime.dtype)
    before = after = None
    if evaluator is not None:
        with clock.stage("evaluate"):
            before = judged(made, evaluator, parts, runtime)
    suspect = Suspect(network=made.network, architecture=choices["model"], spec=parts.spec)
    with clock.stage("defense"):
        runtime.stopwatch = Stopwatch(runtime.workdir)
        data = grant(parts, splits, made, seed, evaluator)
        purified = parts.defense(suspect, data, runtime)
    clock.seconds["defense"] += runtime.stopwatch.earlier
    if processes.first():  # before anything else can go wrong
        save_weights(result.open(cell), tree, parts, purified)
    if evaluator is not None:
        with clock.stage("evaluate"):
            after = evaluator.predict(purified)
    runtime.recorder.notes += unknowns(parts, splits, before)
    evidence = None
    if parts.probe is not None:
        with clock.stage("evidence"):
            evidence = parts.probe(made.network, purified, runtime)

    metrics = describe(tree, parts, clock, made, runtime) | names(choices)
    truth = None if evaluator is None else evaluator.truth
    metrics = results.summarize(before, after, truth) | metrics
    if evidence is not None:
        metrics["evidence"] = evidence.as_dict()
    metrics |= detected(parts, truth, runtime)
    if evaluator is not None and tree["floor"] and parts.attack.active:
        metrics["floor"] = floor(tree, parts, splits, evaluator, runtime)
    if not processes.first():
        return metrics, purified
    report(logger, metrics, runtime.recorder.pictures)
    work = result.open(cell)  # again: somebody may have deleted it
    store(work, tree, evaluator, made, runtime, (before, after), evidence)
    publish(result, work, metrics)
    return metrics, purified


def save_weights(work: Path, tree: dict[str, Any], parts: Parts, purified: Normalized) -> None:
    """``purified.safetensors``, with what shapes do not tell, and a file like the one given.

    Raises:
        ArtefactError: see ``CheckpointFile.write_back``; says where the weights are.
    """
    weights = {k: v.cpu().contiguous() for k, v in purified.state_dict().items()}
    about = {"data": tree["data"]["name"], "image_size": str(purified.spec.image_size)}
    if "stem_stride" in tree["model"]:
        about["stem_stride"] = str(tree["model"]["stem_stride"])
    if purified.unwritten:
        about[UNWRITTEN] = purified.unwritten
    kept = work / "purified.safetensors"
    save_file(weights, kept, metadata=about)
    if isinstance(parts.victim, CheckpointFile):
        try:
            parts.victim.write_back(purified, work)
        except ArtefactError as error:
            raise ArtefactError(f"{error} (the purified weights are in {kept})") from error


def publish(result: ResultFolder, work: Path, metrics: dict[str, Any]) -> None:
    """Metrics and pages, which read the folder; then the folder gets its name."""
    (work / results.METRICS).write_text(results.dump(metrics))
    write_page(work)
    write_overview(work)
    result.publish()


def floor(
    tree: dict[str, Any],
    parts: Parts,
    splits: Splits | None,
    evaluator: Evaluator,
    runtime: Runtime,
) -> dict[str, float | None]:
    """Rates of a clean-trained network of the same recipe under the same trigger."""
    clean = obtain_victim(tree, parts, no_attack(parts.spec), splits, runtime).network
    found = evaluator.predict(clean.to(runtime.device, runtime.dtype))
    rates: dict[str, float | None] = results.summarize(found, found, evaluator.truth)["victim"]
    return rates


_loaded: dict[str, Splits | None] = {}


def load(data: Data, name: str) -> Splits | None:
    """The images of a data set; the last one stays in memory for the next run of a sweep.

    Args:
        name: fingerprint of the data set's config.
    """
    if isinstance(data, OwnImages):  # folders change, and it has to say what it skipped
        return data.load()
    if name not in _loaded:
        _loaded.clear()
        _loaded[name] = data.load()
    return _loaded[name]


_judged: dict[tuple[object, ...], Predictions] = {}


def judged(
    made: victim.Victim, evaluator: Evaluator, parts: Parts, runtime: Runtime
) -> Predictions:
    """What the victim says of the test set; the last answer serves the next defense of a sweep."""
    if made.sha256 is None:
        return evaluator.predict(made.network)
    setting = (runtime.device, runtime.dtype, parts.trainer.threads)
    key = (made.sha256, evaluator.test.fingerprint(), *setting)
    if key not in _judged:
        found = evaluator.predict(made.network)
        _judged.clear()
        _judged[key] = found
    return _judged[key]


def unknowns(parts: Parts, splits: Splits | None, before: Predictions | None) -> list[str]:
    """What was assumed about somebody's file, what was left out, and what nobody can know."""
    if isinstance(parts.victim, Schedule):
        return []
    found = list(parts.victim.assumed)
    if isinstance(parts.data, OwnImages) and parts.data.skipped:
        shown = ", ".join(parts.data.skipped[:8])
        found.append(f"{len(parts.data.skipped)} unreadable images were skipped: {shown}")
    if splits is None or not len(splits.test):
        found.append(
            "without test images the accuracy of neither network is known; generated images only "
            "show that the two agree on what the networks themselves imagine. data.test=FOLDER "
            "measures it"
        )
    if not parts.attack.active:
        found.append(
            "without the trigger no attack success rate can be measured. The reach of the trigger "
            "network speaks of small patches only: a class that stands out is a reason to suspect "
            "a backdoor, none standing out is no proof of its absence"
        )
    if parts.probe is not None and parts.spec.classes > parts.probe.images:
        found.append(
            f"the evidence is about images of the first {parts.probe.images} of "
            f"{parts.spec.classes} classes; probe.images={parts.spec.classes} shows all"
        )
    if before is not None and before.triggered is not None:
        moved = before.triggered[before.triggered != before.clean]
        known = f"the trigger moves {len(moved)} of {len(before.clean)} images to another class"
        if len(moved):
            counts = np.bincount(moved, minlength=parts.spec.classes)
            known += f", {counts.max()} of them to class {counts.argmax()}"
        found.append(f"{known}; success is counted as attack.target_rule and target_class say")
    return found


def no_attack(spec: DataSpec) -> NoAttack:
    """Clean training: what a surrogate and the floor of an attack come from."""
    return NoAttack(
        spec=spec,
        poison_rate=0.0,
        cover_rate=0.0,
        target_class=0,
        target_rule="all_to_one",
        source_classes=[],
        pool="exclude_target",
    )


def obtain_victim(
    tree: dict[str, Any], parts: Parts, attack: Attack, splits: Splits | None, runtime: Runtime
) -> victim.Victim:
    """The suspect's origin: somebody's file, or a victim of the config, stored or newly trained.

    Args:
        attack: the config's, or none: then the result is the clean network of the same recipe.
    """
    if isinstance(parts.victim, Given):
        network = channels_last(Normalized(parts.victim.network, parts.spec))
    else:
        network = build_network(tree, parts.spec, runtime.derive("network"))
    if not isinstance(parts.victim, Schedule):
        if isinstance(parts.victim, CheckpointFile):
            parts.victim.load_into(network)
        codes = torch.zeros(0, dtype=torch.int8)
        return victim.Victim(
            network=network.eval(),
            attack=attack,
            codes=codes,
            seconds=0.0,
            cached=True,
            curves=[],
            work=None,
        )
    schedule = parts.victim
    if splits is None:
        raise ConfigError("data=unknown has no images to train on; set victim=checkpoint or data=")

    def make(work: Path) -> victim.Making:
        own = Runtime(
            trainer_config=parts.trainer,
            seed=runtime.seed,
            workdir=work,
            recorder=Recorder(),
            logger=runtime.logger,
            stopwatch=Stopwatch(work),
        )
        network.to(own.device, own.dtype)
        surrogate = None
        if attack.needs_surrogate:
            clean = obtain_victim(tree, parts, no_attack(parts.spec), splits, runtime)
            surrogate = clean.network.to(own.device, own.dtype).requires_grad_(False)
        codes = train(network, attack.to(own.device), splits.train, schedule, own, surrogate)
        return victim.Making(codes=codes, curves=own.recorder.rows, work=own.tally.work)

    recipe = {k: tree[k] for k in VICTIM_KEYS} | {"precision": parts.trainer.precision}
    if parts.trainer.tf32:
        recipe["tf32"] = True
    recipe["data"] = {k: v for k, v in recipe["data"].items() if k not in ("source", "storage")}
    recipe["images"] = splits.train.fingerprint()
    if not attack.active:
        recipe["attack"] = None  # poisoning options have no effect
    return victim.VictimStore(Path(tree["paths"]["victims"])).obtain(recipe, network, attack, make)


def grant(
    parts: Parts,
    splits: Splits | None,
    made: victim.Victim,
    seed: int,
    evaluator: Evaluator | None,
) -> DefenderData:
    """The defender's data: the pool within the budget, and the poisoned set only if granted."""
    poisoned = oracle = None
    if splits is None:
        return DefenderData(parts.budget, pool=None, train_size=0, seed=seed)
    if parts.budget.poisoned:
        poisoned = made.attack.poison(splits.train, made.codes, seed=seed).resident()

    @torch.no_grad()
    def stamp(x: torch.Tensor, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        device = parts.trainer.device
        attack = made.attack.to(device).eval()
        return attack.apply(x.to(device), y=y.to(device), index=index.to(device))

    if parts.defense.selection == "oracle" and evaluator is not None:
        oracle = evaluator.observer()
    return DefenderData(
        parts.budget,
        pool=splits.pool,
        train_size=len(splits.train) + len(splits.pool),
        seed=seed,
        poisoned=poisoned,
        trigger=stamp if made.attack.active else None,
        oracle=oracle,
    )


def describe(
    tree: dict[str, Any], parts: Parts, clock: Clock, made: victim.Victim, runtime: Runtime
) -> dict[str, Any]:
    """The part of ``metrics.json`` that says what was run, where and how long it took."""
    seconds = clock.seconds | {"victim": made.seconds}
    counted = {"victim": made.work, "defense": runtime.tally.work}
    return {
        "cell": identity.cell(tree),
        "selection": parts.defense.selection,
        "seed": tree["seed"],
        "poison_rate": parts.attack.poison_rate,
        "poisoned": float((made.codes == POISON).float().mean()) if len(made.codes) else None,
        "seconds": {"defense": 0.0, "evaluate": 0.0} | seconds,
        "flops": {k: w and w.flops for k, w in counted.items()},
        "bytes": {k: w and w.bytes for k, w in counted.items()},
        "trained_seconds": {k: w and w.seconds for k, w in counted.items()},
        "peak_flops": counting.peak(parts.trainer.device),
        "cached_victim": made.cached,
        "peak_memory_mb": max(clock.peaks.values()),
        "stage_peak_memory_mb": clock.peaks,
        "precision": parts.trainer.precision,
        "device": str(parts.trainer.device),
        "device_name": counting.device_name(parts.trainer.device),
        "notes": runtime.recorder.notes,
        "versions": results.versions(),
        "commit": results.commit(),
    }


def store(
    work: Path,
    tree: dict[str, Any],
    evaluator: Evaluator | None,
    made: victim.Victim,
    runtime: Runtime,
    predictions: tuple[Predictions | None, Predictions | None],
    evidence: Evidence | None,
) -> None:
    """Everything but weights, metrics and page: config, predictions, curves, pictures."""
    (work / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    arrays: dict[str, Any] = {}
    if evaluator is not None:
        arrays |= vars(evaluator.truth)
        for role, found in zip(("victim", "purified"), predictions, strict=True):
            assert found is not None
            arrays |= {f"{role}_{k}": v for k, v in vars(found).items() if v is not None}
        clean, triggered, index = evaluator.examples(EXAMPLES)
        pictures: dict[str, Any] = {"clean": clean, "index": index}
        if triggered is not None:
            pictures["triggered"] = triggered
        np.savez_compressed(work / "examples.npz", **pictures)
    np.savez_compressed(work / "predictions.npz", **arrays)
    rows = [{"stage": "victim", **r} for r in made.curves]
    rows += [{"stage": "defense", **r} for r in runtime.recorder.rows]
    pd.DataFrame(rows).to_csv(work / "curves.csv", index=False)
    pictures_dir = work / "pictures"
    pictures_dir.mkdir(exist_ok=True)
    for name, made_up in evidence.pictures.items() if evidence else ():
        runtime.recorder.picture(name, made_up)
    for name, images in runtime.recorder.pictures.items():
        results.save_grid(images, pictures_dir / f"{name}.png")
    shutil.rmtree(work / "training", ignore_errors=True)
    (work / results.CELL).unlink()


def reuse(result: ResultFolder, tree: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a finished folder.

    Raises:
        ConfigError: the folder holds the result of another config.
    """
    metrics = result.metrics(identity.cell(tree))
    show(metrics, result.path, reused=True)
    return metrics


def detected(parts: Parts, truth: Truth | None, runtime: Runtime) -> dict[str, Any]:
    """The classes that a detector suspects, beside the attack's targets (None: not known)."""
    if runtime.recorder.suspected is None:
        return {}
    targets = None
    if truth is not None and parts.attack.active:
        targets = np.unique(truth.goal[truth.eligible]).tolist()
    return {"suspected": {"classes": runtime.recorder.suspected, "targets": targets}}


def names(choices: Mapping[str, str]) -> dict[str, str]:
    """What was chosen in each config group."""
    groups = ("data", "model", "attack", "defense", "budget", "scale")
    return {g: choices.get(g) or "custom" for g in groups}
