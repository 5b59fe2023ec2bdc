"""Public functions that take tensors say which shapes they take or give."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

sys.path.append(str(ROOT / "docs"))
import house

SHAPE = re.compile(
    r"\((?:\.\.\.|[A-Z]\w?|[nkmc]|C_\w+|\d+|count|size|channels|classes)\b[^()]*,[^()]*\)"
    r"|\(\)|\bshapes?\b"
)
"""A tuple such as (B, C, H, W), (N,), (count, C, p, p) or (); or the word."""
FILES = [file for room, file in house.sources() if "Tensor" in file.read_text()]


def takes_tensors(node: ast.FunctionDef) -> bool:
    arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
    return any(
        re.search(r"\bTensor\b", ast.unparse(a.annotation)) for a in arguments if a.annotation
    )


def silent(file: Path) -> list[str]:
    """Public functions of a module whose own, inherited or class docstring names no shape."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    found = []
    for node in ast.parse(file.read_text()).body:
        owner = getattr(module, node.name, None) if isinstance(node, ast.ClassDef) else module
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        for f in inner:
            if not isinstance(f, ast.FunctionDef) or f.name.startswith("_") or owner is None:
                continue
            if not takes_tensors(f) or getattr(node, "name", "").startswith("_"):
                continue
            text = inspect.getdoc(getattr(owner, f.name)) or ""
            if owner is not module:
                text += owner.__doc__ or ""
            if not SHAPE.search(text):
                found.append(f"{file.relative_to(ROOT)}:{f.lineno} {f.name}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_shapes_are_named(file: Path) -> None:
    assert not silent(file)
