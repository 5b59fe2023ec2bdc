"""Put victims into a zoo: ``python -m dhbe.sweeping.publish RESULTS... [--zoo zoo]``.

Takes the results of ``defense=none``, reads (or trains) the victim of each, rounds it to float16,
measures what is stored, and writes it with its card. Victims whose card is there are left alone.
ZOO/README.md lists them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from dhbe.core.errors import got
from dhbe.core.exit_status import guarded
from dhbe.core.provenance import commit, versions
from dhbe.evaluation.metrics import Rate, rates
from dhbe.experiment.assembly import assemble
from dhbe.experiment.contents import EXAMPLES, save_grid
from dhbe.experiment.folder import METRICS
from dhbe.experiment.setting import Setting
from dhbe.report.folder import below, read_metrics
from dhbe.victim.store import Victim
from dhbe.victim.train import TrainedVictim
from dhbe.victim.zoo import (
    CARD,
    CARDS,
    NAMED,
    PARTS,
    PICTURE,
    WEIGHTS,
    Card,
    Entry,
    name_of,
    rounded,
)

TITLE = "# Victims made beforehand\n\n"


def publish(results: Sequence[Path], zoo: Path) -> list[Entry]:
    """The entries of all victims below these folders, those of before among them.

    Raises:
        ConfigError: there is no result of ``defense=none`` with a victim that was trained.
    """
    found = []
    for file in sorted(f for f in below(results) if f.name == METRICS):
        metrics = read_metrics(file.parent)
        tree = yaml.safe_load((file.parent / "config.yaml").read_text())
        if metrics["defense"] != "none" or not isinstance(assemble(tree).source, TrainedVictim):
            continue
        choices = {group: metrics[group] for group in NAMED}
        name = name_of(choices, tree["seed"])
        if (zoo / name / CARD).is_file():
            found.append(Entry.read(zoo, name))
        else:
            found.append(made(tree, choices, zoo / name))
            print(f"{name}: ACC {said(found[-1].card.acc)}", flush=True)
    if not found:
        raise got("RESULTS", list(map(str, results)), "folders with results of defense=none")
    return found


def made(tree: dict[str, Any], choices: dict[str, str], folder: Path) -> Entry:
    """Write the victim of a config into ``folder``."""
    parts = assemble(tree)
    parts.trainer.apply()
    with TemporaryDirectory() as scratch:
        setting = Setting.of(tree, parts, choices, Path(scratch), None)
        victim = setting.victim()
    victim.network.load_state_dict(rounded(victim.network.state_dict()))
    card = card_of(setting, victim, choices)
    entry = Entry(folder=folder, card=card).write(victim.network, victim.attack, victim.indicator)
    assert setting.evaluator is not None
    clean, triggered, _ = setting.evaluator.examples(EXAMPLES)
    save_grid(clean if triggered is None else triggered, folder / PICTURE)
    return entry


def card_of(setting: Setting, victim: Victim, choices: dict[str, str]) -> Card:
    """Card of a victim whose network is rounded, but for the hash of its weights."""
    assert setting.splits is not None
    tree = {k: setting.config[k] for k in PARTS}
    tree["data"] = {k: v for k, v in tree["data"].items() if k not in ("source", "storage")}
    predictions = setting.predictions(victim.network)
    assert predictions is not None
    assert setting.evaluator is not None
    found = rates(predictions, setting.evaluator.truth)
    return CARDS.validate_python(
        {
            "sha256": "",
            "choices": choices,
            "config": tree,
            "images": setting.splits.train.fingerprint(),
            "acc": found["acc"],
            "asr": found["asr"],
            "seconds": victim.seconds,
            "precision": setting.parts.trainer.precision,
            "commit": commit(),
            "versions": versions(),
        }
    )


def index(zoo: Path) -> str:
    """Markdown table of a zoo's victims."""
    files = sorted(zoo.glob(f"*/*/*/*/{CARD}"))
    rows = [row(Entry.read(zoo, file.parent.relative_to(zoo).as_posix())) for file in files]
    head = ["victim", "poison", "ACC (95 %)", "ASR (95 %)", "kB"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def row(entry: Entry) -> list[str]:
    """Cells of a victim's row."""
    card, attack = entry.card, entry.card.config["attack"]
    shown = [said(rate) for rate in (card.acc, card.asr)]
    poison = "" if card.asr is None else f"{attack['poison_rate']:.2%} to {attack['target_class']}"
    size = f"{(entry.folder / WEIGHTS).stat().st_size / 1000:,.0f}"
    return [f"`{card.name}`", poison, *shown, size]


def said(rate: Rate | None) -> str:
    """A rate with its interval."""
    if rate is None or rate.interval is None:
        return ""
    low, high = rate.interval
    return f"{rate.value:.2%} ({low:.1%} to {high:.1%})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.sweeping.publish", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--zoo", type=Path, default=Path("zoo"))
    options = parser.parse_args()

    def published() -> None:
        publish(options.results, options.zoo)
        (options.zoo / "README.md").write_text(TITLE + index(options.zoo))

    guarded(published)


if __name__ == "__main__":
    main()
