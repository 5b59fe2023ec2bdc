"""Reports over damaged folders and hostile names: what is sound is shown, the rest is listed."""

from __future__ import annotations

import csv
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from dhbe.report.collect import collect, merge
from dhbe.report.damaged import Damage, listed
from dhbe.report.failed import failures
from dhbe.report.figures import figures
from dhbe.report.folder import finished
from dhbe.report.page import _curves
from dhbe.report.publish import write_figures, write_report
from dhbe.report.tables import labels, markdown
from dhbe.report.texts import drawing, neutral, original, printable
from tests.conftest import ROOT
from tests.support.commands import called
from tests.support.report import write_cell

ODD = [
    *("=HYPERLINK(1)", "+1", "-1", "@SUM(1)", "'=x", "'", "plain", "\ttab", "\rcr", "\nlf", "＝1"),
    *("a|b", "<b>", "$x$"),
]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    """Two results; the second one is to be damaged."""
    for seed in (0, 1):
        folder = tmp_path / "r" / f"c{seed}"
        write_cell(folder, seed=seed, asr=0.1)
        pd.DataFrame({"stage": ["defense"] * 2, "epoch": [0, 1], "loss/x": [1.0, 0.5]}).to_csv(
            folder / "curves.csv", index=False
        )
        images = np.zeros((2, 3, 8, 8), dtype=np.uint8)
        np.savez(folder / "examples.npz", clean=images, triggered=images, index=np.arange(2))
    return tmp_path / "r"


def changed(**values: object) -> Callable[[Path], object]:
    """Other values in ``metrics.json``."""

    def change(folder: Path) -> None:
        file = folder / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def truncate(name: str) -> Callable[[Path], object]:
    def cut(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])

    return cut


def dangling(folder: Path) -> None:
    (folder / "metrics.json").unlink()
    (folder / "metrics.json").symlink_to(folder / "nowhere")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "metrics truncated": (truncate("metrics.json"), "delimiter|Unterminated|Expecting"),
    "metrics empty": (lambda f: (f / "metrics.json").write_text(""), "Expecting value"),
    "metrics a list": (lambda f: (f / "metrics.json").write_text("[]"), "no JSON object"),
    "metrics bare": (lambda f: (f / "metrics.json").write_text("{}"), "lacks '"),
    "metrics binary": (lambda f: (f / "metrics.json").write_bytes(b"\xff\x00"), "decode"),
    "metrics a folder": (
        lambda f: [(f / "metrics.json").unlink(), (f / "metrics.json").mkdir()],
        "Is a directory",
    ),
    "metrics dangling": (dangling, "No such file|missing"),
    "metrics gone": (lambda f: (f / "metrics.json").unlink(), "metrics.json is missing"),
    "rate as text": (changed(purified={"acc": "0.9"}), "purified.acc=0.9: expected a fraction"),
    "rate of 90": (changed(victim={"acc": 90}), "victim.acc=90: expected a fraction"),
    "no rates": (changed(victim=None), "victim=None: expected rates"),
    "seed as text": (changed(seed="a"), "seed=a: expected an integer"),
    "config gone": (lambda f: (f / "config.yaml").unlink(), "config.yaml"),
    "config empty": (lambda f: (f / "config.yaml").write_text(""), "config.yaml: holds no options"),
    "config torn": (lambda f: (f / "config.yaml").write_text("a: [1"), "expected"),
    "config of others": (
        lambda f: (f / "config.yaml").write_text("a: !!python/object:os.x {}"),
        "could not determine a constructor",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_folder_is_listed_with_its_cause(cells: Path, tmp_path: Path, kind: str) -> None:
    make, cause = DAMAGE[kind]
    make(cells / "c1")
    damaged: list[Damage] = []
    table = collect([cells], damaged)
    assert table["seed"].tolist() == [0]
    (found,) = damaged
    assert str(cells / "c1") in found.path
    assert pd.Series([found.cause]).str.contains(cause).all(), found.cause


@pytest.mark.parametrize("name", ["curves.csv", "examples.npz"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\xff\xfe\x00", None])
@pytest.mark.filterwarnings("ignore")
def test_damaged_curves_and_pictures_cost_a_line_of_a_figure(
    cells: Path, tmp_path: Path, name: str, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is None:
        truncate(name)(cells / "c0")
    else:
        (cells / "c0" / name).write_bytes(content)
    shown = {name for name, _, _ in figures(collect([cells]))}
    assert {"heat", "examples" if name == "curves.csv" else "curves"} <= shown


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", '{"choices": 1}'])
def test_a_damaged_record_of_a_failure_is_listed(cells: Path, content: str) -> None:
    (cells / ".abc.failed.json").write_text(content)
    damaged: list[Damage] = []
    assert failures([cells], collect([cells]), damaged).empty
    assert [d.path for d in damaged] == [str(cells / ".abc.failed.json")]


def test_a_result_of_another_cell_finishes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    write_cell(folder, seed=0, asr=0.1, cell="abc")
    assert finished(folder, "abc")
    assert not finished(folder, "def")
    shutil.rmtree(folder)
    write_cell(folder, seed=0, asr=0.1)
    assert finished(folder, "0"), "of before results told their cell"


def test_the_command_shows_what_is_sound_and_lists_the_rest(cells: Path, tmp_path: Path) -> None:
    truncate("metrics.json")(cells / "c1")
    (cells / ".abc.failed.json").write_text("{")
    words = ["-m", "dhbe.report", str(cells), "--out", str(tmp_path / "out")]
    done = called(words, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert f"{cells / 'c1'}: damaged, left out of the report: " in done.stderr
    for file in ("index.html", "tables.md"):
        text = (tmp_path / "out" / file).read_text()
        assert "Damaged, not counted" in text
        assert str(cells / "c1") in text
        assert ".abc.failed.json" in text
    (tmp_path / "out" / "results.csv").write_bytes(b"\xff\x00torn")
    again = called([*words, "--merge"], cwd=ROOT)
    assert again.returncode == 1
    assert f"error: {tmp_path / 'out' / 'results.csv'}: damaged former report" in again.stderr
    shutil.rmtree(cells / "c0")
    nothing = called(words, cwd=ROOT)
    assert nothing.returncode == 1
    assert f"but damaged ones:\n  {cells / 'c1'}: " in nothing.stderr


# ---------------------------------------------------------------- names from elsewhere


def test_no_text_of_a_csv_is_a_formula_and_all_come_back(tmp_path: Path) -> None:
    table = pd.DataFrame({"attack": ODD, "rate": [-float(i) for i in range(len(ODD))]})
    neutral(table).to_csv(tmp_path / "t.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    read = pd.read_csv(tmp_path / "t.csv")
    assert not read["attack"].str.startswith(("=", "+", "-", "@", "\t", "\r", "\n", "＝")).any()
    assert original(read)["attack"].tolist() == ODD
    assert read["rate"].tolist() == table["rate"].tolist(), "numbers stay numbers"


def test_names_that_no_text_can_hold(tmp_path: Path) -> None:
    """Linux takes any bytes for a name; Python keeps those of Latin-1 as lone surrogates."""
    latin = "caf\udce9"
    assert printable({latin: [latin, 1]}) == {"caf\\udce9": ["caf\\udce9", 1]}
    (tmp_path / "lost" / latin).mkdir(parents=True)
    (tmp_path / "lost" / latin / "metrics.json").write_text("{")
    write_cell(tmp_path / latin, seed=0, asr=0.1, model=latin)
    found = collect([tmp_path], damaged := [])
    extra = {"Damaged": listed(damaged)}
    write_report(found, failures([tmp_path], found), tmp_path / "out", extra)
    assert "caf\\udce9" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "udce9" in (tmp_path / "out" / "tables.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")
def test_hostile_names_in_a_whole_report(tmp_path: Path) -> None:
    name = "=cmd|<script>alert(1)</script>$x^$[y](javascript:z)"
    for seed in range(2):
        write_cell(tmp_path / "r" / str(seed), seed=seed, asr=0.1, attack=name, defense="$\\oops$")
    table = collect([tmp_path / "r"])
    write_report(table, failures([tmp_path / "r"], table), tmp_path / "out", {})
    raw = (tmp_path / "out" / "results.csv").read_text()
    assert "'=cmd|" in raw
    assert ",=cmd" not in raw
    text = (tmp_path / "out" / "tables.md").read_text()
    assert "<script>" not in text
    assert "[y](" not in text.replace(r"\[y\](", "")
    first = text.splitlines()[2:5]
    assert len({line.replace(r"\|", "").count("|") for line in first}) == 1, "cells stay cells"
    assert "<script>alert" not in (tmp_path / "out" / "index.html").read_text()
    both = merge(tmp_path / "out" / "results.csv", table)
    assert len(both) == 2, "the same runs under the same names"


@pytest.mark.filterwarnings("ignore")
def test_dollars_are_no_mathematics(tmp_path: Path) -> None:
    """``$\\oops$`` ends matplotlib's parser with an exception, ``$x$`` loses its dollars."""
    for seed, rate in enumerate((0.01, 0.1)):
        attack = {"poison_rate": rate, "name": "$\\oops$"}
        write_cell(
            tmp_path / str(seed),
            seed=seed,
            asr=0.1,
            attack="$\\oops$",
            defense="$x$",
            config={"attack": attack},
            poison_rate=rate,
        )
        curve = {"stage": ["defense"] * 2, "epoch": [0, 1], "loss/$\\oops$": [1.0, 0.5]}
        pd.DataFrame(curve).to_csv(tmp_path / str(seed) / "curves.csv", index=False)
    table = collect([tmp_path])
    assert {"heat.png", "poison_rate.png", "curves.png"} <= {
        f"{name}.png" for name, _, _ in figures(table)
    }
    write_figures(table, tmp_path)
    assert _curves_page(tmp_path / "0")
    with drawing():
        for _, _, figure in figures(table):
            figure.canvas.draw()
            texts = [t for t in figure.findobj(Text) if t.get_text()]
            assert not any(t.get_parse_math() for t in texts)
            assert not any("mathdefault" in t.get_text() for t in texts), "nor is our own"
    assert labels(table)["attacked"].iloc[0].startswith("$\\oops$"), "tables have names as they are"


@drawing()
def _curves_page(folder: Path) -> str | None:
    return _curves(folder / "curves.csv")


def test_markdown_by_hand() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = pd.DataFrame({"a|b": ["<i>x</i>\nsecond", "resnet_tiny"], "n": [0.5, 1.0]})
        assert markdown(table).splitlines() == [
            "| a\\|b | n |",
            "| --- | --- |",
            "| &lt;i&gt;x&lt;/i&gt; second | 0.5 |",
            "| resnet_tiny | 1 |",
        ]
