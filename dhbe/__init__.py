"""DHBE: backdoor attacks on image classifiers, defenses, and a fair comparison of both."""

__version__ = "0.1.0"


from typing import Any


def __getattr__(name: str) -> Any:
    """``dhbe.purify`` without making ``import dhbe`` wait for torch."""
    if name == "purify":
        from importlib import import_module

        return import_module("dhbe.api").purify
    raise AttributeError(f"module 'dhbe' has no attribute {name!r}")
