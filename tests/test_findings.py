"""The first screen of a purified checkpoint's report says what the figures say, and no more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dhbe.report.console import show
from dhbe.report.findings import Finding, findings

NONE = dict.fromkeys(("acc", "asr", "asr_conditional", "ra"))


def rate(hits: int, total: int = 20) -> dict[str, Any]:
    return {"hits": hits, "total": total, "wilson95": None}


def of(names: tuple[str, ...] = (), **changes: Any) -> dict[str, Finding]:
    """Findings by title on a run that scanned and changed one of two layers."""
    evidence = {
        "agreement": rate(18),
        "reach": {"victim": [rate(1), rate(19)], "purified": [rate(2), rate(0)]},
        "weights": {"conv1": 0.0, "layer1.0.conv2": 0.125},
    }
    known: dict[str, Any] = {
        "defense": "auto",
        "suspected": {"classes": [1]},
        "victim": NONE,
        "purified": NONE,
        "counts": {},
    }
    evidence |= changes.pop("evidence", {})
    return {f.title: f for f in findings(known | changes | {"evidence": evidence}, names)}


def test_runs_on_known_data_have_no_such_screen() -> None:
    assert findings({"defense": "clp"}, []) == []


def test_a_suspicious_class_is_named_and_its_certainty_not_invented() -> None:
    found = of(("cat", "frog"))["Found"]
    assert found.text.startswith("Class 1 (frog) stands out: ")
    assert "not a calibrated probability" in found.text
    assert found.alarming
    ranked = of(suspected={"classes": [1], "scores": [0.5, 4.0, 1.25]})["Found"].text
    assert "(highest score of a class 4.0, the next 1.2)" in ranked
    several = of(suspected={"classes": [0, 1]})["Found"].text
    assert several.startswith("Class 0, Class 1 stand out: ")


@pytest.mark.parametrize(
    ("suspected", "said"),
    [({"classes": []}, "does not prove that there is no backdoor"), (None, "does not look for")],
)
def test_nothing_found_is_no_proof(suspected: dict[str, Any] | None, said: str) -> None:
    found = of(suspected=suspected)["Found"]
    assert said in found.text
    assert not found.alarming


def test_what_was_done_is_counted() -> None:
    done = of()["Done"]
    assert done.text == (
        "defense=auto changed 1 of 2 layers, most layer1.0.conv2, by 12.5 % of its norm."
    )
    nothing = of(evidence={"weights": {"conv1": 0.0}})
    assert "changed no weight" in nothing["Done"].text
    assert nothing["Done"].alarming
    assert nothing["Next"].text.startswith("Try defense=dhbe_guided")


def test_a_scan_says_what_it_saw_and_where_to_go() -> None:
    found = of(defense="scan", idle=True, evidence={"weights": {"conv1": 0.0}})
    assert list(found) == ["Found", "Done", "Next"]
    assert found["Done"].text.startswith("defense=scan leaves the network as it is")
    assert "task=purify" in found["Next"].text


@pytest.mark.parametrize(("hits", "alarming"), [(18, False), (0, True)])
def test_accuracy_that_was_not_measured_is_a_dash(hits: int, alarming: bool) -> None:
    cost = of(evidence={"agreement": rate(hits)})["Cost"]
    assert cost.text.startswith("Accuracy: –, no test images were given.")
    assert f"to {hits}, which is no estimate" in cost.text
    assert cost.alarming == alarming


@pytest.mark.parametrize(("after", "alarming"), [(0.88, False), (0.7, True)])
def test_measured_figures_stand_for_themselves(after: float, alarming: bool) -> None:
    measured = {
        "victim": NONE | {"acc": 0.9, "asr": 1.0},
        "purified": NONE | {"acc": after, "asr": 0.03},
        "counts": {"purified": {"acc": rate(0, 500)}},
    }
    found = of(**measured)
    assert found["Cost"].text == (
        f"Accuracy on 500 test images went from 90.0 % to {100 * after:.1f} %."
    )
    assert found["Cost"].alarming == alarming
    assert found["Left"].text.startswith("The given trigger still moves 3.0 %")
    assert not found["Left"].alarming
    assert found["Next"].text == "Keep the original file."


def test_what_is_left_is_the_highest_reach_of_each_network() -> None:
    left = of()["Left"].text
    assert "up to 10.0 % (class 0) of generated images" in left
    assert "before, up to 95.0 % (class 1)" in left
    assert "such as warps" in left


def test_the_console_says_what_was_found_and_where_the_file_is(tmp_path: Path, capsys) -> None:
    (tmp_path / "net-purified.pt").touch()
    metrics = {
        **{"attack": "none", "data": "own", "model": "resnet20", "defense": "auto", "scale": "cpu"},
        **{"seed": 0, "selection": "fixed", "suspected": {"classes": [1]}, "counts": {}},
        **{"victim": NONE, "purified": NONE, "cached_victim": True, "notes": ["note one"]},
        "seconds": {"victim": 0.0, "defense": 61.0},
        "evidence": {
            "agreement": rate(18),
            "reach": {"victim": [rate(1), rate(19)], "purified": [rate(2), rate(0)]},
            "weights": {"conv1": 0.5},
        },
    }
    show(metrics | {"counts": {r: NONE for r in ("victim", "purified")}}, tmp_path)
    said = capsys.readouterr().out
    assert said.startswith("Found: Class 1 stands out")
    assert "auto on resnet20: 61 seconds" in said
    assert "clean accuracy" not in said, "no table of dashes"
    assert f"purified: {tmp_path / 'net-purified.pt'}" in said
