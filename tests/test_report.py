"""Reports over synthetic result folders: arithmetic, escaping, nothing left out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import ROOT, names

from dhbe.report.__main__ import PUBLISHED
from dhbe.report.collect import collect, failures, merge, select
from dhbe.report.folder import detail, percent
from dhbe.report.tables import (
    LEAST,
    beside_published,
    compare,
    latex,
    markdown,
    matrix,
    ranking,
    summarize,
)


def write_cell(
    folder: Path,
    *,
    seed: int,
    asr: float,
    defense: str = "dhbe",
    attack: str = "badnets",
    acc: float = 0.8,
    config: dict | None = None,
) -> None:
    rates = {"acc": 0.9, "asr": 1.0, "asr_conditional": 1.0, "ra": 0.0}
    metrics = {
        "victim": rates,
        "purified": rates | {"acc": acc, "asr": asr},
        "der": (1 - asr - (0.9 - acc) + 1) / 2,
        "counts": {},
        "data": "<b>cifar10</b>",
        "model": "m",
        "attack": attack,
        "defense": defense,
        "budget": "none",
        "selection": "fixed",
        "seed": seed,
        "poison_rate": 0.1,
        "seconds": {"victim": 1.0, "defense": 2.0, "evaluate": 3.0},
        "commit": None,
    }
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    tree = {"attack": {"name": attack}, "defense": {"name": defense}} | (config or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for seed, asr in enumerate((0.1, 0.2, 0.3)):
        write_cell(tmp_path / "r" / f"c{seed}", seed=seed, asr=asr)
    write_cell(tmp_path / "r" / "other", seed=0, asr=0.5, defense="clp")
    write_cell(tmp_path / "r" / ".unfinished.partial", seed=9, asr=0.5)
    return tmp_path / "r"


def test_summary_by_hand(cells: Path) -> None:
    table = collect([cells, cells / "c0"])
    assert len(table) == 4
    summary = summarize(table).set_index("defense")
    assert summary.loc["dhbe", "n"] == 3
    # mean 20, sd 10, t(0.975, 2) = 4.3027: 4.3027 * 10 / sqrt(3) = 24.8
    assert summary.loc["dhbe", "purified ASR"] == "20.0 ± 24.8"
    assert summary.loc["clp", "purified ASR"] == "50.0"
    assert markdown(pd.DataFrame({"a": [1]})) == "| a |\n| --- |\n| 1 |\n"
    assert "20.0 $\\pm$ 24.8" in latex(summary.reset_index())


def test_matrix_says_what_was_not_run(cells: Path) -> None:
    write_cell(cells / "blend", seed=0, asr=0.4, defense="clp", attack="blend")
    wide = matrix(collect([cells])).set_index("defense")
    assert list(wide.columns) == ["badnets", "blend"]
    assert wide.loc["dhbe"].tolist() == ["80.0 ± 0.0 / 20.0 ± 24.8 (n=3)", "not run"]
    assert wide.loc["clp"].tolist() == ["80.0 / 50.0", "80.0 / 40.0"]


def test_failed_is_not_the_same_as_not_run(cells: Path, tmp_path: Path) -> None:
    write_cell(cells / "blend", seed=0, asr=0.4, defense="clp", attack="blend")
    record = {"choices": {"data": "d", "model": "m", "attack": "blend", "defense": "dhbe"}}
    record |= {"seed": 0, "error": "DivergenceError", "message": "<i>nan", "overrides": ["seed=0"]}
    (cells / ".0123.failed.json").write_text(json.dumps(record))
    wide = matrix(collect([cells]), failed=failures([cells])).set_index("defense")
    assert wide.loc["dhbe", "blend"] == "failed (DivergenceError)"
    assert report(cells, tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "DivergenceError" in page
    assert "&lt;i&gt;nan" in page


def test_equal_names_with_unequal_options_are_kept_apart(cells: Path) -> None:
    for seed, rate in ((0, 0.1), (1, 0.1), (0, 0.2)):
        options = {
            "defense": {"schedule": {"rate": rate, "epochs": 3}},
            "trainer": {"threads": seed},
        }
        write_cell(cells / f"n{seed}{rate}", seed=seed, asr=rate, defense="nad", config=options)
    wide = matrix(select(collect([cells]), ["defense=nad"])).set_index("defense")
    assert wide["badnets"].to_dict() == {
        "nad schedule.rate=0.1": "80.0 ± 0.0 / 10.0 ± 0.0 (n=2)",
        "nad schedule.rate=0.2": "80.0 / 20.0",
    }


def test_the_newer_of_two_equal_runs_counts(cells: Path, tmp_path: Path) -> None:
    former = collect([cells])
    write_cell(tmp_path / "again", seed=0, asr=0.9, defense="clp")
    both = collect([cells, tmp_path / "again"])
    assert both.loc[both["defense"] == "clp", "purified_asr"].tolist() == [0.9]
    former.to_csv(tmp_path / "results.csv", index=False)
    merged = merge(tmp_path / "results.csv", collect([tmp_path / "again"]))
    assert len(merged) == 4
    assert merged.loc[merged["defense"] == "clp", "purified_asr"].tolist() == [0.9]
    assert list(matrix(merged)["defense"]) == ["dhbe", "clp"]


def test_overlapping_intervals_are_not_ordered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(8):
        noise = rng.uniform(-0.1, 0.1, 3)
        for k, (defense, asr) in enumerate((("a", 0.2), ("b", 0.2), ("c", 0.8))):
            name = f"{defense}{seed}"
            write_cell(tmp_path / name, seed=seed, asr=asr + noise[k], defense=defense)
    table = collect([tmp_path])
    ranks = ranking(table).set_index("defense")["rank"].to_dict()
    assert ranks == {"a": "1–2", "b": "1–2", "c": "3"}
    pairs = compare(table).set_index(["better", "worse"])
    first = next(p for p in pairs.index if p[1] == "c")
    gap = pairs.loc[first]
    assert gap["victims"] == 8
    assert 20 < gap["low"] < gap["DER difference"] < gap["high"] < 40  # 30 points of DER
    assert gap["p"] == pytest.approx(2 / 2**8)  # all eight signs agree: exact two-sided p


def test_few_victims_order_nothing(tmp_path: Path) -> None:
    for seed in range(LEAST):
        for defense, asr in (("a", 0.1), ("b", 0.9)):
            write_cell(tmp_path / f"{defense}{seed}", seed=seed, asr=asr, defense=defense)
    table = collect([tmp_path])
    assert ranking(table)["rank"].tolist() == ["1", "2"]
    assert ranking(table[table["seed"] > 0])["rank"].tolist() == ["1–2", "1–2"]


def test_unknown_columns_are_named(cells: Path) -> None:
    with pytest.raises(ValueError, match="--where speed=1: no such column; there are"):
        select(collect([cells]), ["speed=1"])


def test_published_figures_stand_beside_ours(cells: Path) -> None:
    table = collect([cells]).assign(data="cifar10")
    same = {"source": "s", "data": "cifar10", "model": "big", "attack": "badnets"}
    same |= {"poison_rate": 0.1, "acc": 80.0}
    figures = pd.DataFrame(
        [same | {"defense": "dhbe", "asr": a} for a in (16.0, 14.0, 9.0, 30.0)]
        + [same | {"defense": "nad", "asr": 1.0}]
    )
    found = beside_published(table, figures)
    assert found["band"].tolist() == ["inside", "outside", "inside", "no band"]
    assert found["ASR"].unique().tolist() == ["20.0 ± 24.8"]


def test_shipped_figures_name_their_source_and_ours() -> None:
    figures = pd.read_csv(PUBLISHED)
    assert figures[["source", "data", "model", "acc", "asr"]].notna().all(axis=None)
    assert set(figures["attack"]) <= set(names("attack"))
    assert set(figures["defense"]) <= set(names("defense"))
    assert set(figures["model"]) <= set(names("model"))


def report(cells: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dhbe.report", str(cells), "--out", str(out), *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_writes_everything_and_escapes(cells: Path, tmp_path: Path) -> None:
    done = report(cells, tmp_path / "out", "--where", "attack=badnets", "--merge")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "results.parquet",
        "tables.md",
        "tables.tex",
        "heat.png",
        "pareto.png",
        "seconds.png",
        "index.html",
    }
    page = (tmp_path / "out" / "index.html").read_text()
    assert "&lt;b&gt;cifar10" in page
    assert "<b>" not in page
    assert "http" not in page, "opens without a network"
    assert report(cells, tmp_path / "out", "--where", "attack=blend").returncode == 1


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
PROBE = """<script>
  const section = [...document.querySelectorAll("section")].at(-1);
  const column = [...section.querySelectorAll("th")].findIndex(t => t.innerText === "purified_asr");
  const seen = () => [...section.querySelector("tbody").rows].filter(r => !r.hidden)
    .map(r => r.cells[column].innerText).join(" ");
  section.querySelectorAll("th")[column].querySelector("button").click();
  const up = seen();
  section.querySelectorAll("th")[column].querySelector("button").click();
  const down = seen(), box = section.querySelector("input");
  box.value = "DHBE badnets"; box.dispatchEvent(new Event("input"));
  const count = section.querySelector(".count").innerText;
  document.body.dataset.probe = [up, down, seen(), count].join("|");
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_page_sorts_and_filters_in_a_browser(cells: Path, tmp_path: Path) -> None:
    assert BROWSER is not None
    assert report(cells, tmp_path / "out").returncode == 0
    page = tmp_path / "out" / "index.html"
    page.write_text(page.read_text().replace("</html>", PROBE + "</html>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    done = subprocess.run(
        [BROWSER, *options, "--window-size=400,800", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = done.stdout.partition('data-probe="')[2].partition('"')[0]
    up, down, filtered, count = found.split("|")
    assert up == "0.1 0.2 0.3 0.5"
    assert down == "0.5 0.3 0.2 0.1"
    assert filtered == "0.3 0.2 0.1"
    assert count == "3 of 4 rows"


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dhbe.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no metrics.json below" in done.stderr


def test_texts() -> None:
    assert percent(0.1234) == "12.3 %"
    assert percent(None) == "–"
    assert detail({"hits": 1, "total": 2, "wilson95": [0.1, 0.9]}) == "1/2, 95 %: 10.0–90.0"
    assert detail({"hits": 0, "total": 0, "wilson95": None}) == ""
