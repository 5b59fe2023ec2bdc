"""The product speaks plain technical English."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

RETIRED = (
    "that is at it",
    "whoever varies",
    "leaves open and a file answers",
    "in the eyes of",
    "evaluation's eyes",
    r"(with|lightning's) eyes",
    "eyes on",
    "asleep",
    "door to data",
    "a hit is a hit",
    "misses were looked at",
    r"somebody's (file|weights|checkpoint) ",
    "nobody can know",
    "what nobody",
    r"packs? of 64",
    r"\.carry\b",
    r"\bscratch trials\b",
    r"\bissue \d+\b",
    r"\bissue's figure\b",
    r"\bthe others' work\b",
)
"""Phrases of a laboratory diary."""
PATTERN = re.compile("|".join(RETIRED), re.IGNORECASE)
FORGIVEN = ("tests/test_words.py", "CHANGELOG.md")
SUFFIXES = {".py", ".md", ".yaml", ".yml", ".toml", ".html", ".cff", ".css", ".ipynb", ""}


def texts() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:  # not a git checkout
        return [p for p in ROOT.glob("*/**/*.py") if ".venv" not in p.parts]
    found = [ROOT / name for name in listed.stdout.splitlines() if name not in FORGIVEN]
    return [p for p in found if p.suffix in SUFFIXES and p.is_file() and "corpus" not in p.parts]


def test_no_retired_phrase() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match.group()}"
        for file in texts()
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if (match := PATTERN.search(line))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("phrase", ["with eyes on the test set", "leave it asleep"])
def test_it_can_find_one(phrase: str) -> None:
    assert PATTERN.search(phrase)
