"""Ours against the authors' code, loaded from clones: ``python -m benchmarks.fidelity FOLDER``."""
