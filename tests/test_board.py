"""The board: entries from results, what was measured again, the page, the schema."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dhbe.core.errors import ConfigError
from dhbe.experiment.pipeline import run
from dhbe.report.board import add, board_page, differing, placeless, read
from dhbe.sweeping.remeasure import config_of, drawn, remeasure
from tests.conftest import ROOT
from tests.support.browser import BROWSER, browse
from tests.support.commands import called
from tests.support.report import write_cell

BOARD = ROOT / "docs" / "results" / "board"


def counted(hits: int, low: float, high: float) -> dict[str, Any]:
    return {"hits": hits, "total": 100, "wilson95": [low, high]}


def write(folder: Path, *, acc: float = 0.8, **more: Any) -> Path:
    """A result folder that the board takes."""
    before = {"acc": counted(90, 0.82, 0.95), "asr": counted(100, 0.96, 1.0), "ra": None}
    after = {"acc": counted(round(100 * acc), acc - 0.07, acc + 0.07), "asr": None, "ra": None}
    known = {
        "cell": "c0ffee",
        "scale": "cpu",
        "notes": ["<i>a note</i>"],
        "versions": {"torch": "2.14.1"},
        "device": "cpu",
        "peak_memory_mb": 100.0,
        "counts": {"victim": before, "purified": after},
        "config": {"data": {"source": {"root": "/home/me/data"}}, "paths": {"data": "/home/me"}},
    }
    write_cell(folder, seed=3, asr=0.02, acc=acc, **(known | more))
    return folder


def test_a_result_becomes_an_entry(tmp_path: Path) -> None:
    (file,) = add([write(tmp_path / "run")], tmp_path / "board", [])
    assert file.name == "badnets.dhbe.3.c0ffee.json"
    entry = read(file)
    assert entry.claimed.rates["purified"] == {"acc": 0.8, "asr": 0.02, "ra": 0.0}
    assert (entry.remeasured, entry.unreliable, entry.doubt) == (None, None, None)
    assert entry.config["data"] == {"source": {"root": "data"}}, "places stay at home"
    assert "paths" not in entry.config
    assert add([tmp_path / "run"], tmp_path / "board", []) == [], "the same result again"


@pytest.mark.parametrize(("acc", "differs"), [(0.79, False), (0.5, True)])
def test_another_run_of_the_cell_is_measured_again(
    tmp_path: Path, acc: float, differs: bool
) -> None:
    board = tmp_path / "board"
    add([write(tmp_path / "one")], board, [])
    (file,) = add([write(tmp_path / "two", acc=acc)], board, [])
    entry = read(file)
    assert entry.claimed.rates["purified"]["acc"] == 0.8
    assert entry.remeasured is not None
    assert entry.remeasured.rates["purified"]["acc"] == acc
    assert bool(differing(entry)) == differs == bool(entry.doubt)
    if differs:
        assert entry.doubt == "purified ACC 80.0 %, measured again 50.0 %"


def test_a_damaged_result_is_listed_and_the_others_are_added(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "good")
    (write(tmp_path / "runs" / "bad", cell="dead") / "config.yaml").unlink()
    damaged: list[Any] = []
    assert len(add([tmp_path / "runs"], tmp_path / "board", damaged)) == 1
    assert [Path(d.path).name for d in damaged] == ["bad"]


def test_the_page_stands_alone_escapes_and_says_what_is_unreliable(tmp_path: Path) -> None:
    board = tmp_path / "board"
    (file,) = add([write(tmp_path / "run")], board, [])
    marked = json.loads(file.read_text()) | {"unreliable": "chosen on the test set"}
    file.write_text(json.dumps(marked))
    page = board_page(board, tmp_path / "out").read_text()
    assert "Unreliable: chosen on the test set" in page
    assert "&lt;b&gt;cifar10&lt;/b&gt;" in page
    assert "<b>cifar10" not in page
    assert "<i>a note" not in page
    assert "src=" not in page
    assert page.count('class="card"') == 1


PROBE = """<script>
const open = () => [...document.querySelectorAll(".card")].filter(c => !c.hidden).map(c => c.id);
const rows = () => [...document.querySelectorAll("tr[data-card]")].filter(r => !r.hidden)
  .map(r => r.nextElementSibling.id + ":" + r.dataset.card);
const titles = [...document.querySelectorAll("th button")];
const title = titles.find(b => b.textContent === "purified acc");
const found = [];
document.querySelector("tr[data-card] button").click(); found.push(open().join());
title.click(); title.click(); found.push(rows().join());
const input = document.querySelector("input");
input.value = "clp"; input.dispatchEvent(new Event("input"));
found.push(rows().join(), open().join());
document.body.dataset.probe = found.join("|");
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_rows_open_and_keep_their_cards_in_a_browser(tmp_path: Path) -> None:
    board = tmp_path / "board"
    for i, (defense, acc) in enumerate((("clp", 0.7), ("dhbe", 0.9), ("nad", 0.8))):
        add([write(tmp_path / str(i), cell=str(i), defense=defense, acc=acc)], board, [])
    page = board_page(board, tmp_path)
    page.write_text(page.read_text().replace("</html>", PROBE + "</html>"))
    done = browse(page, "--virtual-time-budget=5000", "--dump-dom")
    assert "CONSOLE" not in done.stderr, done.stderr
    opened, order, filtered, left = (
        done.stdout.partition('data-probe="')[2].partition('"')[0].split("|")
    )
    assert opened == "card1"
    assert order == "card2:card2,card3:card3,card1:card1", "best accuracy first, cards below rows"
    assert (filtered, left) == ("card1:card1", "card1")


ON_PAPER = """<script>
for (const sheet of document.styleSheets)
  for (const rule of sheet.cssRules)
    if (rule.media?.mediaText === "print") rule.media.mediaText = "all";
const look = query => getComputedStyle(document.querySelector(query)).display;
const seen = ["label", ".count", ".card", "details", "tbody tr"].map(look);
document.body.dataset.probe = seen.join("|");
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_print_hides_controls_and_opens_rows(tmp_path: Path) -> None:
    board = tmp_path / "board"
    add([write(tmp_path / "0", cell="0")], board, [])
    page = board_page(board, tmp_path)
    page.write_text(page.read_text().replace("</html>", ON_PAPER + "</html>"))
    done = browse(page, "--virtual-time-budget=5000", "--dump-dom")
    assert 'data-probe="none|none|table-row|none|table-row"' in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed: Input should be greater than or equal to 0"),
        ({"wonder": 1}, r"wonder: Unexpected keyword argument"),
        ({"claimed": {}}, r"claimed.rates: Field required"),
    ],
    ids=["seed", "unknown", "missing"],
)
def test_what_does_not_fit_the_schema_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    (file,) = add([write(tmp_path / "run")], tmp_path / "board", [])
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"{file.name}: {message}"):
        board_page(tmp_path / "board", tmp_path)


@pytest.mark.parametrize("file", sorted(BOARD.glob("*.json")), ids=lambda f: f.name)
def test_our_own_board_fits(file: Path) -> None:
    entry = read(file)
    assert entry.file == file.name
    assert placeless(entry.config) == entry.config


def test_the_command(tmp_path: Path) -> None:
    write(tmp_path / "run")
    done = called(["-m", "dhbe.report", "run", "--board", "b", "--out", "page"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page" / "board.html").exists()
    assert "written: 1; left out as damaged: 0" in done.stdout
    for words, status, said in (
        (["--board", "none"], 1, "--board none: no entries"),
        (["page", "--board", "b"], 1, "no metrics.json below page"),
        (["run", "--board", "b", "--where", "seed=3"], 2, "leave out --where"),
    ):
        wrong = called(["-m", "dhbe.report", *words], cwd=tmp_path)
        assert wrong.returncode == status
        assert said in wrong.stderr


def test_a_share_is_drawn_by_its_seed(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i:02}.json").touch()
    assert len(drawn(tmp_path, 0.01, 0)) == 1
    assert drawn(tmp_path, 0.1, 1) == drawn(tmp_path, 0.1, 1) != drawn(tmp_path, 0.1, 2)
    with pytest.raises(ConfigError, match=r"BOARD=.*: expected a folder with entries"):
        drawn(tmp_path / "empty", 0.1, 0)
    with pytest.raises(ConfigError, match=r"--share=1.5: expected a fraction"):
        drawn(tmp_path, 1.5, 0)


@pytest.mark.long
def test_a_cell_is_measured_again_from_its_file(tmp_path: Path, compose_config, capsys) -> None:
    tiny = ("data.limit=60", "data.train_size=7600", "model.widths=[16]", "victim.epochs=1")
    cfg = compose_config(*tiny, "defense=clp", "trainer.threads=1", "trainer.device=cpu")
    names = {"data": "cifar10_mini", "model": "resnet_tiny", "attack": "badnets"}
    run(cfg, tmp_path / "run", names | {"defense": "clp", "budget": "none", "scale": "quick"})
    board = tmp_path / "board"
    (file,) = add([tmp_path / "run"], board, [])
    out = tmp_path / "again"
    remeasure(Namespace(board=board, share=1.0, seed=0, out=out, changes=[]))
    entry = read(file)
    assert entry.remeasured is not None
    assert entry.remeasured.rates == entry.claimed.rates, "the seed fixes everything"
    assert list((out / "victims").iterdir()), "the victim was trained anew"
    assert f"{file.name}: agrees" in capsys.readouterr().out
    first = (out / entry.cell / "metrics.json").stat().st_mtime_ns
    remeasure(Namespace(board=board, share=1.0, seed=0, out=out, changes=[]))
    assert (out / entry.cell / "metrics.json").stat().st_mtime_ns > first, "measured, not reused"
    with pytest.raises(ConfigError, match=r"data=tiny: expected a data set of conf/data"):
        config_of(replace(entry, data="tiny"), [], out)
    with pytest.raises(ConfigError, match=rf"{file.name}: its config is cell .* here, not"):
        config_of(entry, ["defense.u=2.0"], out)
