"""What the site is made of, as far as it can be checked without building it (``make docs``)."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.conftest import ROOT, names

DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", text))
    pages = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    assert listed == pages
    assert yaml.safe_load(text)["strict"] is True


def test_the_gallery_shows_attacks_that_exist() -> None:
    shown = re.findall(r"\n## (\w+)\n", page := (DOCS / "gallery.md").read_text())
    assert len(shown) >= 25
    assert set(shown) <= set(names("attack"))
    for name in shown:
        assert f"(pictures/attacks/{name}.png)" in page
        assert (DOCS / "pictures" / "attacks" / f"{name}.png").exists()


@pytest.mark.parametrize("zoo", ["attacks", "defenses"])
def test_the_api_lists_methods_that_exist(zoo: str) -> None:
    listed = re.findall(rf"::: {zoo}\.(\w+)", (DOCS / "api" / f"{zoo}.md").read_text())
    assert len(listed) >= 20
    assert set(listed) <= {p.stem for p in (ROOT / zoo).glob("*.py")}


@pytest.mark.parametrize("zoo", ["attack", "defense"])
def test_references_are_of_methods_that_exist(zoo: str) -> None:
    found = re.findall(rf"{zoo}: ([\w, ]+)", (DOCS / "references.bib").read_text())
    cited = {name.strip() for name in ",".join(found).split(",")}
    assert len(cited) >= 15
    assert not [c for c in cited if not any(n.startswith(c) for n in names(zoo))]


@pytest.mark.parametrize(
    "group", ["data", "attack", "defense", "victim", "budget", "trainer", "logger"]
)
def test_the_choices_exist(group: str) -> None:
    page = (DOCS / "choices.md").read_text()
    (line,) = (x for x in page.splitlines() if x.startswith(f"| `{group}` |"))
    listed = set(re.findall(r"`(\w+)`", line.split("|")[2]))
    assert listed
    assert listed <= set(names(group))


def test_the_glossary_is_in_order() -> None:
    text = (DOCS / "glossary.md").read_text()
    terms = re.findall(r"\n\n([^\n:#]+)\n:   ", text)
    assert len(terms) >= 20
    assert terms == sorted(terms, key=str.lower)
