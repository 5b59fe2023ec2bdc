"""Execute a notebook in place: ``python docs/notebook.py examples/compare_defenses.ipynb``.

An error in a cell ends with its traceback and exit status 1. Kernel and times are left out of the
file, so that it changes only where an output does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

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
    for key in ("kernelspec", "language_info"):
        notebook.metadata.pop(key, None)
    nbformat.write(notebook, file)


if __name__ == "__main__":
    execute(Path(sys.argv[1]))
