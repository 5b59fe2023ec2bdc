"""Measure some of a board's cells again: ``python -m dhbe.sweeping.remeasure BOARD [key=value]``.

Draws a share of the entries, runs their configs on this machine, and puts the new figures beside
the claimed ones. Victims are made anew, in OUT/victims, where a second call finds them. Data sets
lie where ``paths.data`` says; ``key=value`` replaces other values of all drawn configs, such as
``victim.path=``. Exit status: 0 all agree, 1 some do not, or failed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dhbe.api import composed
from dhbe.config import identity
from dhbe.config.resolution import resolved
from dhbe.core.errors import ConfigError, got
from dhbe.core.exit_status import guarded
from dhbe.core.paths import CONF
from dhbe.experiment.pipeline import run
from dhbe.experiment.summary import GROUPS
from dhbe.report.board import Entry, add, differing, read


def drawn(board: Path, share: float, seed: int) -> list[Path]:
    """Files of ``share`` of the entries, at least one, drawn at random.

    Raises:
        ConfigError: the board is empty, or no such share.
    """
    if not 0 < share <= 1:
        raise got("--share", share, "a fraction above 0, up to 1")
    files = sorted(board.glob("*.json"))
    if not files:
        raise got("BOARD", str(board), "a folder with entries of python -m dhbe.report --board")
    return sorted(random.Random(seed).sample(files, max(1, round(share * len(files)))))


def config_of(entry: Entry, changes: Sequence[str], victims: Path) -> dict[str, Any]:
    """The entry's config with this machine's places; victims are made anew in ``victims``.

    Raises:
        ConfigError: here it is another cell, because a file or the meaning of an option differs; or
            its data set is a user's own.
    """
    if not (CONF / "data" / f"{entry.data}.yaml").exists():
        raise got(f"{entry.file}: data", entry.data, "a data set of conf/data")
    here = composed([f"data={entry.data}", f"paths.victims={victims}", "force=true"])
    tree = entry.config | {k: here[k] for k in identity.CELL_EXCLUDED if k in here}
    tree["data"] = tree["data"] | {"source": here["data"]["source"]}
    config = OmegaConf.merge(OmegaConf.create(tree), OmegaConf.from_dotlist(list(changes)))
    found: dict[str, Any] = OmegaConf.to_container(config)  # type: ignore[assignment]
    cell = identity.cell_name(resolved(found, names(entry))[0])
    if cell != entry.cell:
        raise ConfigError(
            f"{entry.file}: its config is cell {cell} here, not {entry.cell}; name the files that "
            "it starts from (victim.path=...), or check out the entry's commit"
        )
    return found


def names(entry: Entry) -> dict[str, str]:
    """Chosen config of each group."""
    return {group: getattr(entry, group) for group in GROUPS}


def remeasure(options: argparse.Namespace) -> None:
    """Run the drawn entries one after the other; say how each ended."""
    agree = True
    for file in drawn(options.board, options.share, options.seed):
        entry = read(file)
        folder = options.out / entry.cell
        config = config_of(entry, options.changes, options.out / "victims")
        run(OmegaConf.create(config), folder, names(entry))
        add([folder], options.board, [])
        differences = differing(read(file))
        agree = agree and not differences
        print(f"{file.name}: {', '.join(differences) or 'agrees'}")
    if not agree:
        sys.exit(1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m dhbe.sweeping.remeasure", description=__doc__)
    parser.add_argument("board", type=Path)
    parser.add_argument("changes", nargs="*", metavar="key=value")
    parser.add_argument("--share", type=float, default=0.01, help="of the entries (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("outputs/remeasured"))
    options = parser.parse_args()
    guarded(lambda: remeasure(options))


if __name__ == "__main__":
    main()
