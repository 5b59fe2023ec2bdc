"""The authors' functions, cut out of a clone at run time and run in one namespace."""

from __future__ import annotations

import ast
import copy
import itertools
import logging
import math
import random
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

REPOSITORIES = {
    "ABL": ("bboylyg/ABL", "3fd736c"),
    "ANP_backdoor": ("csdongxian/ANP_backdoor", "ec7b179"),
    "AWM": ("jinghuichen/AWM", "a4a5f16"),
    "AdvDoor": ("ZQ-Struggle/AdvDoor", "257e7d8"),
    "BPE": ("Syyabb/BPE", "2c2be83"),
    "BackdoorBench": ("SCLBD/BackdoorBench", "f02e353"),
    "Backdoor-Defense-Via-Suppressing-Model-Shortcuts": (
        "20000yshust/Backdoor-Defense-Via-Suppressing-Model-Shortcuts",
        "cd9ced4",
    ),
    "Backdoor_Safety_Tuning": ("AISafety-HKUST/Backdoor_Safety_Tuning", "37d2ef5"),
    "BppAttack": ("RU-System-Software-and-Security/BppAttack", "f6b6580"),
    "2024ZhouCETF": ("MiLab-HITSZ/2024ZhouCETF", "45d9546"),
    "DHBE": ("yanzhicong/DHBE", "901cd55"),
    "Data-Free-Adversarial-Distillation": ("VainF/Data-Free-Adversarial-Distillation", "c161591"),
    "FIP-Fisher-Backdoor-Removal": ("nazmul-karim170/FIP-Fisher-Backdoor-Removal", "b787f04"),
    "FTrojan": ("SoftWiser-group/FTrojan", "300e054"),
    "I-BAU": ("YiZeng623/I-BAU", "d4bfa52"),
    "NAD": ("bboylyg/NAD", "f17b713"),
    "NFT-Augmented-Backdoor-Purification": (
        "nazmul-karim170/NFT-Augmented-Backdoor-Purification",
        "9e40cac",
    ),
    "NIPS2022_EP_BNP": ("RJ-T/NIPS2022_EP_BNP", "af5150d"),
    "OTBR": ("linweiii/OTBR", "fa293e5"),
    "RNP": ("bboylyg/RNP", "eeae192"),
    "TSBD": ("linweiii/TSBD", "3718c67"),
    "Trap-and-Replace-Backdoor-Defense": (
        "VITA-Group/Trap-and-Replace-Backdoor-Defense",
        "89e0c3a",
    ),
    "ULRL": ("NayMyatMin/ULRL", "094debf"),
    "Warping-based_Backdoor_Attack-release": (
        "VinAIResearch/Warping-based_Backdoor_Attack-release",
        "45e8c33",
    ),
    "backdoor-toolbox": ("vtu81/backdoor-toolbox", "9d4d909"),
    "backdoors101": ("ebagdasa/backdoors101", "9f48fbb"),
    "channel-Lipschitzness-based-pruning": (
        "rkteddy/channel-Lipschitzness-based-pruning",
        "5209c83",
    ),
    "composite-attack": ("TemporaryAcc0unt/composite-attack", "29f0137"),
    "input-aware-backdoor-attack-release": (
        "VinAIResearch/input-aware-backdoor-attack-release",
        "1750e4f",
    ),
}
"""Folder of a clone -> owner and name at GitHub, commit that was compared."""
OLD = {
    r"\.cuda\(\)": "",
    r"(['\"])cuda\1": "'cpu'",
    r"\bnp\.(float|int|bool)\b": r"\1",
    r"\bnp\.round_": "np.round",
    r"\bnp\.lib\.pad": "np.pad",
    r"_conv_forward\(input, weight\)": "_conv_forward(input, weight, self.bias)",
}
"""What neither a CPU nor today's PyTorch and NumPy know, and what takes its place."""


class Comparison(NamedTuple):
    """One row of the table: the largest difference is what ``function`` returns."""

    method: str
    sources: tuple[str, ...]
    given: dict[str, Any]
    function: Callable[[Official], float]


class Missing(Exception):
    """A clone, or a package that the authors' code needs, is not there; says which."""


COMPARISONS: list[Comparison] = []


def compare(method: str, *sources: str, **given: Any) -> Callable[..., Any]:
    """Register a comparison; its docstring says what is compared.

    Args:
        sources: ``repository/file: name, name``; classes, functions (methods, too) and constants.
        given: what else the authors' code shall find in its namespace.
    """

    def register(function: Callable[[Official], float]) -> Callable[[Official], float]:
        COMPARISONS.append(Comparison(method, sources, given, function))
        return function

    return register


class Official:
    """Names of the sources as attributes.

    Raises:
        Missing: a clone is not in the folder.
    """

    def __init__(self, folder: Path, sources: Iterable[str], given: dict[str, Any]) -> None:
        self.space = NAMES | copy.copy(given)
        self.trees = []
        for source in sources:
            path, _, names = source.partition(": ")
            repository = path.split("/")[0]
            if not (folder / path).is_file():
                raise Missing(f"not found: https://github.com/{REPOSITORIES[repository][0]}")
            text = (folder / path).read_text(encoding="utf-8", errors="replace")
            for old, new in OLD.items():
                text = re.sub(old, new, text)
            tree = ast.parse(text)
            self.trees.append(tree)
            self.run([found(tree, name) for name in names.split(", ")], self.space)

    def __getattr__(self, name: str) -> Any:
        return self.space[name]

    def excerpt(self, first: str, last: str, **variables: Any) -> SimpleNamespace:
        """Run consecutive statements in the middle of a function; returns what they define.

        Args:
            first, last: how the first and the last of them begin, as ``ast.unparse`` writes them.
            variables: what they find, beside the names of the sources.
        """
        blocks = (
            block
            for tree in self.trees
            for node in ast.walk(tree)
            for name in ("body", "orelse")
            if isinstance(block := getattr(node, name, None), list)
        )
        for block in blocks:
            texts = [ast.unparse(statement) for statement in block]
            start = next((i for i, text in enumerate(texts) if text.startswith(first)), None)
            ends = (i for i, text in enumerate(texts) if text.startswith(last))
            end = next((i for i in ends if start is not None and i >= start), None)
            if start is not None and end is not None:
                space = self.space | variables
                self.run(block[start : end + 1], space)
                return SimpleNamespace(**space)
        raise LookupError(f"no statements from {first!r} to {last!r}")

    @staticmethod
    def run(nodes: list[ast.stmt], space: dict[str, Any]) -> None:
        """Execute statements in a namespace."""
        module = ast.fix_missing_locations(ast.Module(body=nodes, type_ignores=[]))
        exec(compile(module, "<official>", "exec"), space)


def found(tree: ast.Module, name: str) -> ast.stmt:
    """The first class, function or assignment of that name, without Numba's decorators."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
            node.decorator_list = [
                d for d in node.decorator_list if not ast.unparse(d).startswith("jit")
            ]
            return node
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return node
    raise LookupError(name)


class Meter:
    """Stands for the authors' counters of losses."""

    avg = val = 0.0

    def update(self, *_: Any) -> None:
        """Nothing is counted."""


NAMES: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": F,
    "Tensor": Tensor,
    "Parameter": nn.Parameter,
    "init": nn.init,
    "np": np,
    "math": math,
    "random": random,
    "copy": copy,
    "logging": logging,
    "cycle": itertools.cycle,
    "transforms": transforms,
    "OrderedDict": OrderedDict,
    "AverageMeter": Meter,
    "Variable": lambda x: x,
    "tqdm": lambda x, **_: x,
    "device": "cpu",
    "print": lambda *_, **__: None,
}
"""What the authors' files import."""
