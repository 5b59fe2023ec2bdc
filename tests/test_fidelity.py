"""docs/fidelity.md has a row for every published method; its script names a missing clone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks.fidelity.__main__ import row
from benchmarks.fidelity.official import COMPARISONS, REPOSITORIES, Official
from tests.conftest import CONF, ROOT

OURS = {
    "dhbe.contracts.attack.NoAttack",
    "attacks.picture.Picture",
    "defenses.auto.Auto",
    "defenses.none.NoDefense",
    "defenses.scan_unlearn.ScanUnlearn",
}


def target(group: str, name: str) -> str:
    """The class of a config, its own or that of the config it starts from."""
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    if "_target_" in node:
        return node["_target_"]
    found = (d for d in node["defaults"] if (CONF / group / f"{d}.yaml").is_file())
    return target(group, next(found))


def test_every_published_method_has_a_row() -> None:
    text = (ROOT / "docs" / "fidelity.md").read_text()
    rows = text.partition("## Rows that were run anew")[0].splitlines()
    cells = [row.split(" | ") for row in rows if row.startswith("| ") and "`" in row]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell[0])}
    methods: dict[str, set[str]] = {}
    for group in ("attack", "defense"):
        for file in (CONF / group).glob("*.yaml"):
            methods.setdefault(target(group, file.stem), set()).add(file.stem)
    assert len(methods) > 55
    missing = {k: names for k, names in methods.items() if k not in OURS and not names & named}
    assert not missing
    assert named <= set().union(*methods.values()), "a row of a config that does not exist"
    assert all(len(cell) == 5 for cell in cells), (
        "official source, compared, difference, deviations"
    )


def test_a_missing_clone_is_named(tmp_path: Path) -> None:
    needed = {s.split("/")[0] for comparison in COMPARISONS for s in comparison.sources}
    assert needed == REPOSITORIES.keys()
    for comparison in COMPARISONS:
        assert "| not found: https://github.com/" in row(comparison, tmp_path)


def test_pieces_of_a_clone_are_cut_out(tmp_path: Path) -> None:
    """A method, a constant, and statements in the middle of a function that cannot be called."""
    (tmp_path / "ABL").mkdir()
    (tmp_path / "ABL" / "code.py").write_text(
        "import unknown\nk = 3\nclass A(unknown.B):\n    def twice(self, x):\n"
        "        return x.cuda() * 2\ndef main():\n    args = unknown.parse()\n"
        "    y = x + k\n    z = 2 * y\n    unknown.save(z)\n"
    )
    official = Official(tmp_path, ["ABL/code.py: k, twice"], {})
    assert official.twice(None, torch.ones(1)) == 2
    assert official.excerpt("y = x", "z = ", x=1).z == 8
    with pytest.raises(LookupError):
        official.excerpt("y = x", "unknown.load", x=1)
