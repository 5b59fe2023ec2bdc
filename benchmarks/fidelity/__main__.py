"""Compare our methods with their authors' code: ``python -m benchmarks.fidelity FOLDER [method]``.

FOLDER holds clones under the names of their repositories: ``git clone https://github.com/OWNER/NAME``
for those of ``official.REPOSITORIES``, which names the commits as well. Nothing of them is copied:
functions are cut out of their files at run time, get the same random inputs as ours, on a CPU and
in double precision, and the largest difference becomes a row of a table in Markdown. A clone that
is not there makes its rows say so. FTrojan and Refool also need the package opencv-python-headless,
CTRL needs kornia. docs/fidelity.md tells what else differs, on purpose.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import torch

from benchmarks.fidelity import attacks, game, pruning, tuning  # noqa: F401 (they register)
from benchmarks.fidelity.official import COMPARISONS, Comparison, Missing, Official


def row(comparison: Comparison, folder: Path) -> str:
    """A line of the table."""
    method, sources, given, function = comparison
    torch.manual_seed(0)
    try:
        difference = f"{function(Official(folder, sources, given)):.1g}"
    except Missing as what:
        difference = str(what)
    said = " ".join((function.__doc__ or "").split()).rstrip(".")
    return f"| {method} | {'; '.join(f'`{s}`' for s in sources)} | {said} | {difference} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", help="default: all")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # the authors' code is old
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    start = time.perf_counter()
    print("| method | file: function | compared | largest difference |")
    print("| --- | --- | --- | --- |")
    for comparison in COMPARISONS:
        if not chosen.methods or comparison.method in chosen.methods:
            print(row(comparison, chosen.folder.expanduser()), flush=True)
    print(f"\n{time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    main()
