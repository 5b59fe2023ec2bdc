"""Reports over synthetic result folders: arithmetic, escaping, nothing left out."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from PIL import Image

from dhbe.report.__main__ import PUBLISHED
from dhbe.report.collect import collect, merge, relabel, select
from dhbe.report.failed import failures
from dhbe.report.figures import curves, figures, over, seconds
from dhbe.report.folder import detail, percent
from dhbe.report.legend import class_names, explained
from dhbe.report.page import COLOURS, _curves, style
from dhbe.report.picture import gallery
from dhbe.report.tables import (
    LEAST,
    beside_published,
    compare,
    labels,
    latex,
    markdown,
    matrix,
    ranking,
    summarize,
)
from dhbe.report.texts import drawing
from tests.conftest import ROOT, names
from tests.support.browser import BROWSER, browse
from tests.support.commands import called
from tests.support.report import write_cell


def write_failure(
    folder: Path,
    name: str,
    *overrides: str,
    seed: int = 0,
    defense: str = "dhbe",
    attack: str = "badnets",
    data: str = "<b>cifar10</b>",
    budget: str = "none",
    **more: object,
) -> None:
    """The record of the cell ``folder/name``, which need not exist."""
    choices = {"data": data, "model": "m", "attack": attack, "defense": defense, "budget": budget}
    record = {"choices": choices, "seed": seed, "error": "DivergenceError", "message": "<i>nan"}
    record |= {"overrides": [f"seed={seed}", *overrides], "config_mistake": False} | more
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".{name}.failed.json").write_text(json.dumps(record))


def both(folder: Path) -> pd.DataFrame:
    """The table of attacks by defenses, failures included."""
    table = collect([folder])
    table, failed = relabel(table, failures([folder], table))
    return matrix(table, failed=failed).set_index("defense")


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    for seed, asr in enumerate((0.1, 0.2, 0.3)):
        write_cell(tmp_path / "r" / f"c{seed}", seed=seed, asr=asr)
    write_cell(tmp_path / "r" / "other", seed=0, asr=0.5, defense="clp")
    write_cell(tmp_path / "r" / ".unfinished.partial", seed=9, asr=0.5)
    return tmp_path / "r"


def test_work_stands_beside_seconds(tmp_path: Path) -> None:
    counted = {k: {"victim": None, "defense": v} for k, v in (("flops", 6e12), ("bytes", 3e9))}
    counted["trained_seconds"] = {"victim": None, "defense": 2.0}
    write_cell(tmp_path / "counted", seed=0, asr=0.1, **counted, peak_flops=1e13)
    write_cell(tmp_path / "older", seed=1, asr=0.1)
    new, old = collect([tmp_path]).set_index("seed").sort_index().to_dict("records")
    assert (new["flops_defense"], new["bytes_defense"]) == (6e12, 3e9)
    assert (new["flops_per_second_defense"], new["share_of_peak_defense"]) == (3e12, 0.3)
    assert pd.isna(new["flops_victim"])
    assert pd.isna(old["flops_defense"])


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
    assert wide.loc["dhbe (none, fixed)"].tolist() == ["80.0 ± 0.0 / 20.0 ± 24.8 (n=3)", "not run"]
    assert wide.loc["clp (none, fixed)"].tolist() == ["80.0 / 50.0 (n=1)", "80.0 / 40.0 (n=1)"]


def test_failed_is_not_the_same_as_not_run(cells: Path, tmp_path: Path) -> None:
    write_cell(cells / "blend", seed=0, asr=0.4, defense="clp", attack="blend")
    write_failure(cells, "0123", attack="blend")
    assert both(cells).loc["dhbe (none, fixed)", "blend"] == "failed (DivergenceError)"
    assert report(cells, tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert "DivergenceError" in page
    assert "&lt;i&gt;nan" in page


def test_failures_stand_where_they_happened(cells: Path) -> None:
    """By data set, budget and options; in a row of their own where nothing finished."""
    write_cell(cells / "two", seed=0, asr=0.4, data="two")
    write_cell(cells / "five", seed=0, asr=0.4, budget="pct5", defense="clp")
    for rate in (0.1, 0.2):
        options = {"defense": {"rate": rate, "name": "nad"}}
        write_cell(cells / f"n{rate}", seed=0, asr=rate, defense="nad", config=options)
    write_failure(cells, "a", data="two", budget="pct5", defense="clp")
    write_failure(cells, "c", "defense.rate=0.2", "trainer.threads=1", defense="nad", data="two")
    for seed in (0, 1):
        reason = {"config_mistake": True, "message": "anp needs an image,\ngets 0"}
        write_failure(cells, f"d{seed}", seed=seed, defense="anp", data="two", **reason)
    write_failure(cells, "e", seed=0, defense="anp", data="two")
    wide = both(cells)
    two, one = "two badnets", "<b>cifar10</b> badnets"
    assert wide.loc["clp (pct5, fixed)", two] == "failed (DivergenceError)"
    assert wide.loc["clp (none, fixed)", two] == "not run"
    assert wide.loc["dhbe (none, fixed)", one] == "80.0 ± 0.0 / 20.0 ± 24.8 (n=3)"
    assert wide.loc["nad (none, fixed) rate=0.2", two] == "failed (DivergenceError)"
    assert wide.loc["nad (none, fixed) rate=0.1", two] == "not run"
    said = "failed (DivergenceError); 2 skipped (anp needs an image, gets 0)"
    assert wide.loc["anp (none)"].to_dict() == {one: "not run", two: said}


def test_failures_of_unknown_options_are_nobodys(cells: Path) -> None:
    """Two victims bear these names, and the record does not tell which it was, or names a third."""
    for epochs in (3, 5):
        options = {"victim": {"epochs": epochs}}
        write_cell(cells / f"e{epochs}", seed=0, asr=0.1, attack="blend", config=options)
    write_failure(cells, "a", attack="blend")
    write_failure(cells, "b", "victim.epochs=9", attack="blend")
    write_failure(cells, "c", "victim.epochs=5", seed=1, attack="blend")
    found = both(cells).loc["dhbe (none, fixed)"].to_dict()
    assert found.pop("badnets").endswith("(n=3)")
    assert found == {
        "blend": "failed (DivergenceError)",
        "blend epochs=3": "80.0 / 10.0 (n=1)",
        "blend epochs=5": "80.0 / 10.0 (n=1, 1 failed)",
        "blend epochs=9": "failed (DivergenceError)",
    }


def test_failed_seeds_are_counted_beside_n(cells: Path) -> None:
    write_failure(cells, "b", seed=7)
    assert both(cells).loc["dhbe (none, fixed)", "badnets"].endswith("(n=3, 1 failed)")


def test_finished_later_is_not_failed_and_failures_obey_where(cells: Path, tmp_path: Path) -> None:
    write_failure(cells, "c0")  # as recorded before a single run finished it
    write_failure(cells, "other2", seed=5, defense="clp")
    table = collect([cells])
    failed = failures([cells], table)
    assert failed["defense"].tolist() == ["clp"]
    known = [*table, *failed]
    assert len(select(failed, ["defense=clp", "seed=5", "selection=fixed"], known)) == 1
    for other in ("defense=dhbe", "poison_rate=0.3", "purified_asr=0.5"):
        assert select(failed, [other], known).empty
    assert report(cells, tmp_path / "out", "--where", "defense=dhbe").returncode == 0
    assert "failed" not in (tmp_path / "out" / "tables.md").read_text().lower()


def test_all_cells_failed_is_a_report_too(tmp_path: Path) -> None:
    write_failure(tmp_path / "r", "a", attack="badnets")
    write_failure(tmp_path / "r", "b", attack="blend", config_mistake=True, message="no images")
    done = report(tmp_path / "r", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert "| dhbe (none) | failed (DivergenceError) | skipped (no images) |" in done.stdout
    assert "DivergenceError" in (tmp_path / "out" / "index.html").read_text()
    write_cell(tmp_path / "s" / "c", seed=0, asr=0.1)
    done = report(tmp_path / "s", tmp_path / "out", "--merge")
    assert "80.0 / 10.0 (n=1)" in done.stdout, done.stderr


def test_equal_names_with_unequal_options_are_kept_apart(cells: Path) -> None:
    for seed, rate in ((0, 0.1), (1, 0.1), (0, 0.2)):
        options = {
            "defense": {"schedule": {"rate": rate, "epochs": 3}},
            "trainer": {"threads": seed},
        }
        write_cell(cells / f"n{seed}{rate}", seed=seed, asr=rate, defense="nad", config=options)
    wide = matrix(select(collect([cells]), ["defense=nad"])).set_index("defense")
    assert wide["badnets"].to_dict() == {
        "nad (none, fixed) schedule.rate=0.1": "80.0 ± 0.0 / 10.0 ± 0.0 (n=2)",
        "nad (none, fixed) schedule.rate=0.2": "80.0 / 20.0 (n=1)",
    }


def test_runs_from_before_a_switch_existed_are_those_with_it_off(cells: Path) -> None:
    switches = ({}, {"tf32": False, "compile": "never", "recompute": False}, {"tf32": True})
    for seed, trainer in enumerate(switches):
        write_cell(
            cells / f"n{seed}", seed=seed, asr=0.1, defense="nad", config={"trainer": trainer}
        )
    wide = matrix(select(collect([cells]), ["defense=nad"])).set_index("defense")
    assert wide["badnets"].to_dict() == {
        "nad (none, fixed)": "80.0 ± 0.0 / 10.0 ± 0.0 (n=2)",
        "nad (none, fixed) tf32=True": "80.0 / 10.0 (n=1)",
    }


def test_n_counts_values(cells: Path) -> None:
    rates = {"acc": 0.8, "asr": None, "asr_conditional": None, "ra": None}
    write_cell(cells / "blank", seed=5, asr=0, defense="clp", purified=rates)
    wide = matrix(collect([cells])).set_index("defense")
    assert wide.loc["clp (none, fixed)", "badnets"] == "80.0 ± 0.0 / 50.0 (n=2/1)"


def test_labels_name_budget_and_selection(cells: Path) -> None:
    write_cell(cells / "seen", seed=0, asr=0.4, defense="anp", budget="pct5", selection="oracle")
    names = set(matrix(collect([cells]))["defense"])
    assert names == {"dhbe (none, fixed)", "clp (none, fixed)", "anp (pct5, oracle)"}


def test_the_newer_of_two_equal_runs_counts(cells: Path, tmp_path: Path) -> None:
    former = collect([cells])
    write_cell(tmp_path / "again", seed=0, asr=0.9, defense="clp")
    both = collect([cells, tmp_path / "again"])
    assert both.loc[both["defense"] == "clp", "purified_asr"].tolist() == [0.9]
    former.to_csv(tmp_path / "results.csv", index=False)
    merged = merge(tmp_path / "results.csv", collect([tmp_path / "again"]))
    assert len(merged) == 4
    assert merged.loc[merged["defense"] == "clp", "purified_asr"].tolist() == [0.9]
    assert list(matrix(merged)["defense"]) == ["dhbe (none, fixed)", "clp (none, fixed)"]


def test_merge_keeps_methods_of_other_options_apart(tmp_path: Path) -> None:
    for epochs in (15, 30):
        options = {"defense": {"epochs": epochs}}
        write_cell(tmp_path / f"r{epochs}" / "c", seed=0, asr=epochs / 100, config=options)
    assert report(tmp_path / "r15", tmp_path / "out").returncode == 0
    merged = merge(tmp_path / "out" / "results.csv", collect([tmp_path / "r30"]))
    assert matrix(merged).set_index("defense")["badnets"].to_dict() == {
        "dhbe (none, fixed) epochs=15": "80.0 / 15.0 (n=1)",
        "dhbe (none, fixed) epochs=30": "80.0 / 30.0 (n=1)",
    }
    (tmp_path / "out" / "options.json").unlink()  # a report of an earlier version
    merged = merge(tmp_path / "out" / "results.csv", collect([tmp_path / "r30"]))
    assert len(matrix(merged)) == len(summarize(merged)) == 2
    assert {f"#{m[:6]}" for m in merged["method"]} == set(merged["defense_variant"])


def test_overlapping_intervals_are_not_ordered(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for seed in range(8):
        noise = rng.uniform(-0.1, 0.1, 3)
        for k, (defense, asr) in enumerate((("a", 0.2), ("b", 0.2), ("c", 0.8))):
            name = f"{defense}{seed}"
            write_cell(tmp_path / name, seed=seed, asr=asr + noise[k], defense=defense)
    table = collect([tmp_path])
    ranks = ranking(table).set_index("defense")["rank"].to_dict()
    assert ranks == {
        f"{k} (none, fixed)": v for k, v in zip("abc", ("1–2", "1–2", "3"), strict=True)
    }
    pairs = compare(table).set_index(["better", "worse"])
    first = next(p for p in pairs.index if p[1].startswith("c"))
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


def test_links_are_followed_once(tmp_path: Path) -> None:
    """Linked cells and folders of cells; loops and broken links are no reason to stop."""
    write_cell(tmp_path / "store" / "c0", seed=0, asr=0.1)
    write_cell(tmp_path / "store" / "c1", seed=1, asr=0.1)
    (tmp_path / "store" / ".c2.failed.json").write_text(
        json.dumps({"choices": {}, "overrides": [], "seed": 2, "error": "E", "message": "m"})
    )
    results = tmp_path / "results"
    results.mkdir()
    (results / "linked").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(results)
    (results / "gone").symlink_to(tmp_path / "nowhere")
    table = collect([results])
    assert sorted(table["seed"]) == [0, 1]
    assert {Path(f).parent for f in table["folder"]} == {results / "linked"}
    assert failures([results], table)["seed"].tolist() == [2]
    (results / "cell").symlink_to(tmp_path / "store" / "c0")
    assert sorted(collect([results])["seed"]) == [0, 1]
    assert collect([results / "cell"])["seed"].tolist() == [0]


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


def test_published_figures_stand_beside_one_method_at_a_time(tmp_path: Path) -> None:
    for place, (budget, selection) in enumerate(
        (("pct5", "fixed"), ("pct5", "oracle"), ("pct1", "fixed"))
    ):
        said = {"budget": budget, "selection": selection, "data": "cifar10"}
        write_cell(tmp_path / str(place), seed=0, asr=0.1 * (place + 1), **said)
    figure = {"source": "s", "data": "cifar10", "model": "big", "attack": "badnets"}
    figure |= {"poison_rate": 0.1, "defense": "dhbe", "acc": 80.0, "asr": 10.0}
    found = beside_published(collect([tmp_path]), pd.DataFrame([figure]))
    assert found[["budget", "selection", "n", "ASR"]].to_numpy().tolist() == [
        ["pct1", "fixed", 1, "30.0"],
        ["pct5", "fixed", 1, "10.0"],
        ["pct5", "oracle", 1, "20.0"],
    ]


def lines(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    """Points of each labelled line."""
    found = {}
    for bars in axes.containers:
        found[bars.get_label()] = [tuple(p) for p in bars[0].get_xydata().round(6).tolist()]
    return found


def test_figure_over_poison_rate_holds_everything_else(tmp_path: Path) -> None:
    runs = itertools.product((0.01, 0.1), (0, 1), ("dhbe", "clp"), ("one", "two"), (3, 5))
    for number, (rate, seed, defense, data, epochs) in enumerate(runs):
        asr = rate + (data == "two") * 0.5 + (epochs == 5) * 0.2
        options = {"attack": {"poison_rate": rate}, "defense": {"epochs": epochs, "name": defense}}
        skewed = {"acc": 0.9, "asr": 0.5 + seed / 2, "asr_conditional": 1.0, "ra": 0.0}
        if seed and defense == "clp":
            continue  # so that a mean over rows would count seed 0 twice as often
        said = {"data": data, "poison_rate": rate, "victim": skewed, "config": options}
        write_cell(tmp_path / str(number), seed=seed, asr=asr, defense=defense, **said)
    figure = over(collect([tmp_path]), "poison_rate")
    assert figure is not None
    assert [a.get_title() for a in figure.axes] == ["one badnets", "two badnets"]
    one, two = (lines(a) for a in figure.axes)
    assert one.keys() == two.keys()
    assert set(one) == {
        *(f"{d} (none, fixed) epochs={e}" for d in ("dhbe", "clp") for e in (3, 5)),
        "victim",
    }
    assert one["dhbe (none, fixed) epochs=3"] == [(0.01, 1), (0.1, 10)]
    assert two["clp (none, fixed) epochs=5"] == [(0.01, 71), (0.1, 80)]
    assert one["victim"] == [(0.01, 75), (0.1, 75)]
    assert {t.get_text() for t in figure.legends[0].get_texts()} == set(one)


def test_figure_over_clean_images_shows_methods_that_need_none(tmp_path: Path) -> None:
    data = {"classes": 10, "train_size": 1000}
    runs = [("nad", "pct1", 0.01, 0), ("nad", "pct5", 0.05, 0), ("nad", "pct5", 0.05, 1)]
    runs += [("dhbe", "none", 0, 0), ("abl", "poisoned", 0, 0), ("anp", "pct5", 0.05, 0)]
    for number, (defense, name, fraction, seed) in enumerate(runs):
        budget = {"name": name, "fraction": fraction, "poisoned": name == "poisoned"}
        victim = {"acc": 0.9, "asr": 0.5 + seed / 2, "asr_conditional": 1.0, "ra": 0.0}
        said = {"config": {"data": data, "budget": budget}, "budget": name, "victim": victim}
        write_cell(tmp_path / str(number), seed=seed, asr=fraction, defense=defense, **said)
    figure = over(collect([tmp_path]), "clean_images")
    assert figure is not None
    (axes,) = figure.axes
    assert lines(axes) == {"nad (fixed)": [(10, 1), (50, 5)], "dhbe (fixed)": [(0, 0)]}
    (dashed,) = [a for a in axes.lines if a.get_label() == "victim"]
    assert set(dashed.get_ydata()) == {75.0}


def test_a_limited_data_set_has_fewer_clean_images(tmp_path: Path) -> None:
    budget = {"name": "pct5", "fraction": 0.05}
    for seed, limit in enumerate((0, 200)):
        data = {"classes": 10, "train_size": 1000, "limit": limit}
        write_cell(tmp_path / str(seed), seed=seed, asr=0, config={"data": data, "budget": budget})
    assert collect([tmp_path]).set_index("seed")["clean_images"].to_dict() == {0: 50, 1: 10}


def test_curves_can_be_told_apart(tmp_path: Path) -> None:
    for k in range(12):
        write_cell(tmp_path / f"c{k}", seed=0, asr=0.1, defense=f"d{k}")
        losses = "stage,epoch,student/loss\n" + "".join(f"defense,{e},{k}\n" for e in range(30))
        (tmp_path / f"c{k}" / "curves.csv").write_text(losses)
    figure = curves(labels(collect([tmp_path])))
    assert figure is not None
    drawn = figure.axes[0].lines
    looks = {(a.get_color(), a.get_marker(), a.get_linestyle()) for a in drawn}
    assert len(looks) == 12
    assert {a.get_color() for a in drawn} <= set(COLOURS)
    assert {t.get_text() for t in figure.legends[0].get_texts()} == {a.get_label() for a in drawn}
    assert len({(style(k)["color"], style(k)["marker"]) for k in range(119)}) == 119


def test_page_of_a_run_has_the_same_lines(tmp_path: Path) -> None:
    file = tmp_path / "curves.csv"
    rows = "".join(f"defense,{e},0.9,0.1,{e},2,3\n" for e in range(3))
    file.write_text("stage,epoch,val/acc,val/asr,student/loss,patch/loss,generator/loss\n" + rows)
    url = _curves(file)
    assert url is not None
    drawn = base64.b64decode(url.partition(",")[2]).decode()
    assert all(c.lower() in drawn for c in COLOURS[:3])
    assert "#1f77b4" not in drawn, "the first colour of matplotlib"
    assert drawn.count("stroke-dasharray") > 2
    file.write_text("stage,epoch,student/loss\ndefense,0,2\ndefense,1,1\n")
    alone = base64.b64decode((_curves(file) or "").partition(",")[2]).decode()
    assert 'width="324pt"' in alone, "no empty panel for rates that nobody measured"
    file.write_text("stage,epoch,student/loss\nvictim,0,2\n")
    assert _curves(file) is None


def test_axis_of_less_than_a_decade_has_plain_numbers() -> None:
    table = pd.DataFrame({"method_name": ["a", "b"], "seconds_defense": [135.0, 370.0]})
    with drawing():
        figure = seconds(table)
        figure.canvas.draw()
    texts = [t.get_text() for t in figure.axes[0].get_xticklabels(which="both")]
    assert any(texts)
    assert not [t for t in texts if "$" in t]


@pytest.mark.parametrize("channels", [1, 3])
def test_gallery_shows_each_attack_once(tmp_path: Path, channels: int) -> None:
    clean = np.zeros((8, channels, 16, 16), dtype=np.uint8)
    for attack, seed in (("blend", 0), ("blend", 1), ("badnets", 0), ("none", 0)):
        folder = tmp_path / f"{attack}{seed}"
        write_cell(folder, seed=seed, asr=0.1, attack=attack, data="mini")
        found = {"clean": clean, "index": np.arange(8)}
        found |= {"triggered": clean + 200} if attack != "none" else {}
        np.savez_compressed(folder / "examples.npz", **found)
    drawn = {name: figure for name, _, figure in figures(collect([tmp_path]))}
    figure = drawn["examples"]
    assert [a.texts[0].get_text() for a in figure.axes] == ["badnets\nmini", "blend\nmini"]
    (picture,) = figure.axes[0].images
    pixels = np.asarray(picture.get_array()).reshape(16, 10, 17, channels)[:, :, :16]
    assert (pixels[:, :5] == 0).all()
    assert (pixels[:, 5:] == 200).all()
    assert gallery(collect([tmp_path]).query("attack == 'none'")) is None


def test_shipped_figures_name_their_source_and_ours() -> None:
    figures = pd.read_csv(PUBLISHED)
    assert figures[["source", "data", "model", "acc", "asr"]].notna().all(axis=None)
    assert set(figures["attack"]) <= set(names("attack"))
    assert set(figures["defense"]) <= set(names("defense"))
    assert set(figures["model"]) <= set(names("model"))


def report(cells: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "dhbe.report", str(cells), "--out", str(out), *more]
    return called(command, cwd=ROOT)


def test_command_writes_everything_and_escapes(cells: Path, tmp_path: Path) -> None:
    done = report(cells, tmp_path / "out", "--where", "attack=badnets", "--merge")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results.csv",
        "results.parquet",
        "options.json",
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
    nothing = report(cells, tmp_path / "out", "--where", "attack=blend")
    assert nothing.returncode == 1
    assert "no run has attack=blend; there are attack: " in nothing.stderr


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
  const width = document.documentElement.scrollWidth;
  parent.postMessage([up, down, seen(), count, width, innerWidth].join("|"), "*");
</script>"""
PHONE = """<body><iframe src="index.html" style="width: 390px; height: 800px; border: 0"></iframe>
<script>onmessage = event => { document.body.dataset.probe = event.data; };</script></body>"""
"""A window is 500 pixels wide at least; a frame may be as narrow as a phone."""


def test_columns_and_metrics_are_explained(cells: Path, tmp_path: Path) -> None:
    assert explained("purified ASR").startswith("Attack success rate")
    assert explained("victim_acc").startswith("Clean accuracy")
    assert explained("ACC").startswith("Clean accuracy")
    assert explained("folder") == ""
    assert class_names("cifar10_mini", "data: {}")[3] == "cat"
    assert class_names("own", "data: {class_names: [yes it, 2]}") == ["yes it", "2"]
    assert class_names("gtsrb", "data: {class_names: names.txt}") == []
    assert report(cells, tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'title="Attack success rate' in page
    assert "prefers-color-scheme: dark" in page
    assert 'content: "victim_asr "' in page, "a row of many columns is printed with their names"


@pytest.mark.long
def test_figures_for_papers(cells: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert report(cells, out, "--format", "svg", "pdf").returncode == 0
    assert (out / "pareto.pdf").read_bytes().startswith(b"%PDF")
    assert "<text" in (out / "pareto.svg").read_text(), "text stays text"
    assert not list(out.glob("*.png"))


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX on this machine")
def test_tables_compile(cells: Path, tmp_path: Path) -> None:
    odd = {"attack_variant": "a_b=5% & $x$ {#}~^", "defense": "dhbe"}
    write_cell(cells / "odd", seed=0, asr=0.4, attack="my_attack")
    assert report(cells, tmp_path / "out").returncode == 0
    tables = (tmp_path / "out" / "tables.tex").read_text() + latex(pd.DataFrame([odd]))
    head = "\\documentclass{article}\\usepackage{booktabs}\\begin{document}\\tiny\n"
    (tmp_path / "paper.tex").write_text(f"{head}{tables}\n\\end{{document}}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "paper.pdf").exists()


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_page_sorts_and_filters_in_a_browser(cells: Path, tmp_path: Path) -> None:
    assert report(cells, tmp_path / "out").returncode == 0
    page = tmp_path / "out" / "index.html"
    page.write_text(page.read_text().replace("</html>", PROBE + "</html>"))
    phone = page.with_name("phone.html")
    phone.write_text(PHONE)
    done = browse(phone, "--virtual-time-budget=5000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    found = done.stdout.partition('data-probe="')[2].partition('"')[0]
    up, down, filtered, count, width, window = found.split("|")
    assert up == "0.1 0.2 0.3 0.5"
    assert down == "0.5 0.3 0.2 0.1"
    assert filtered == "0.3 0.2 0.1"
    assert count == "3 of 4 rows"
    assert int(width) <= int(window) == 390, "scrolls sideways on a phone"


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_page_is_drawn_by_a_browser(cells: Path, tmp_path: Path) -> None:
    assert report(cells, tmp_path / "out").returncode == 0
    shot = tmp_path / "shot.png"
    browse(tmp_path / "out" / "index.html", "--window-size=1200,900", f"--screenshot={shot}")
    with Image.open(shot) as picture:
        pixels = np.asarray(picture.convert("L"))
    assert pixels.shape == (900, 1200)
    assert shot.stat().st_size > 20_000  # an empty page takes 4 kB
    assert 0.01 < (pixels < 128).mean() < 0.5, "dark text on a light page"


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    done = called(["-m", "dhbe.report", str(tmp_path)], cwd=ROOT)
    assert done.returncode == 1
    assert "no metrics.json below" in done.stderr


def test_texts() -> None:
    assert percent(0.1234) == "12.3 %"
    assert percent(None) == "–"
    assert detail({"hits": 1, "total": 2, "wilson95": [0.1, 0.9]}) == "1/2, 95 %: 10.0–90.0"
    assert detail({"hits": 0, "total": 0, "wilson95": None}) == ""


SGD = {"_target_": "dhbe.training.schedule.Schedule", "epochs": 10, "learning_rate": 0.2}
SGD |= {"weight_decay": 0.0}
EARLIER = {"victim": SGD | {"schedule": "cosine", "milestones": [], "decay": 0.1}}
TODAY = {
    "victim": SGD | {"shape": {"_target_": "dhbe.training.schedule.Cosine", "end": 0.0}},
}


def test_earlier_folders_bear_the_names_of_today(tmp_path: Path) -> None:
    """One case, one method: suffix and schedule of then are scale and shape of now."""
    node = {"defense": {"epochs": 20}, "attack": {"poison_rate": 0.2}}
    earlier = {"attack": "wanet_cpu", "defense": "dhbe_cpu", "config": EARLIER | node}
    today = {"attack": "wanet", "defense": "dhbe", "config": TODAY | node, "scale": "cpu"}
    write_cell(tmp_path / "then", seed=0, asr=0.1, **earlier)  # type: ignore[arg-type]
    write_cell(tmp_path / "now", seed=1, asr=0.1, **today)  # type: ignore[arg-type]
    table = collect([tmp_path])
    for column in ("case", "method", "attack", "defense", "scale", "attack_variant"):
        assert table[column].nunique() == 1, column
    assert set(table["scale"]) == {"cpu"}
    (row,) = summarize(table).to_dict("records")
    assert (row["defense"], row["scale"], row["n"]) == ("dhbe", "cpu", 2)


def test_another_shape_is_another_case(tmp_path: Path) -> None:
    constant = SGD | {"shape": {"_target_": "dhbe.training.schedule.Constant"}}
    for i, config in enumerate([TODAY, {"victim": constant}, EARLIER]):
        more = {} if config is EARLIER else {"scale": "cpu"}
        write_cell(tmp_path / str(i), seed=i, asr=0.1, config=config, **more)
    cases = collect([tmp_path]).set_index("seed")["case"]
    assert cases[0] != cases[1]
    assert cases[0] == cases[2]


def test_scales_tell_methods_of_one_name_apart(tmp_path: Path) -> None:
    for i, scale in enumerate(("cpu", "paper")):
        node = {"defense": {"epochs": 20 + i, "iterations": 15 + i}}
        write_cell(tmp_path / scale, seed=0, asr=0.1, config=node, scale=scale)
    assert set(collect([tmp_path])["defense_variant"]) == {"scale=cpu", "scale=paper"}


def test_an_ablation_is_no_failure_of_the_method(tmp_path: Path) -> None:
    """A failed cell of several changed options does not stand in the row of the finished one."""
    write_cell(tmp_path / "base", seed=0, asr=0.1, scale="paper")
    write_failure(tmp_path, "lost", "ablation={patch_size:3}")
    finished = collect([tmp_path])
    (lost,) = failures([tmp_path], finished).to_dict("records")
    assert lost["method"] != finished["method"][0]
