"""Execute a notebook in place: ``python docs/notebook.py examples/compare_defenses.ipynb``.

An error in a cell ends with its traceback and exit status 1. Versions and times are left out of
the file, so that it changes only where an output does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""What is kept: nothing of the machine's own kernel."""
LIMIT = 3600
"""Seconds per cell."""


def execute(file: Path) -> None:
    """Run all cells in the notebook's folder and store their outputs."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=LIMIT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(file.parent)}},
    )
    client.execute()
    notebook.metadata = METADATA
    nbformat.write(notebook, file)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
