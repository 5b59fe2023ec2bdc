"""DHBE: backdoor attacks on image classifiers, defenses, and a fair comparison of both."""

__version__ = "0.1.0"


from typing import Any

LAZY = {"purify": "dhbe.api", "scan": "dhbe.api", "load_victim": "dhbe.victim.zoo"}
"""Function -> the module that has it."""


def __getattr__(name: str) -> Any:
    """``dhbe.purify`` and the like without making ``import dhbe`` wait for torch."""
    if name in LAZY:
        from importlib import import_module

        return getattr(import_module(LAZY[name]), name)
    raise AttributeError(f"module 'dhbe' has no attribute {name!r}")
