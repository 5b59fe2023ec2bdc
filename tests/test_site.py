"""What the site is made of, as far as it can be checked without building it (``make docs``)."""

from __future__ import annotations

import re

import yaml

from tests.conftest import ROOT, names

DOCS = ROOT / "docs"
OWN = {"none", "own", "picture", "dhbe_balanced", "dhbe_fast", "dhbe_guided"}
"""Configs without a paper."""


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w/]+\.md", text))
    pages = {str(p.relative_to(DOCS)) for p in DOCS.rglob("*.md")}
    assert listed == pages
    assert yaml.safe_load(text)["strict"] is True


def test_the_gallery_shows_every_attack() -> None:
    page = (DOCS / "gallery.md").read_text()
    for name in set(names("attack")) - {"none", "picture"}:
        assert f"\n## {name}\n" in page
        assert f"(pictures/attacks/{name}.png)" in page
        assert (DOCS / "pictures" / "attacks" / f"{name}.png").exists()


def test_the_api_has_a_section_for_every_method() -> None:
    for zoo in ("attacks", "defenses"):
        listed = set(re.findall(rf"::: {zoo}\.(\w+)", (DOCS / "api" / f"{zoo}.md").read_text()))
        assert listed == {p.stem for p in (ROOT / zoo).glob("*.py")} - {"__init__"}


def test_every_method_has_a_reference() -> None:
    text = (DOCS / "references.bib").read_text()
    for zoo in ("attack", "defense"):
        found = ",".join(re.findall(rf"{zoo}: ([\w, ]+)", text))
        cited = {name.strip() for name in found.split(",")}
        for name in set(names(zoo)) - OWN:
            family = {name} | {
                name.removesuffix(e) for e in ("_a2a", "_tri1", "_square", "_many", "_one_shot")
            }
            assert family & cited, name


def test_the_choices_are_complete() -> None:
    page = (DOCS / "choices.md").read_text()
    for group in ("data", "attack", "defense", "victim", "scale", "budget", "trainer", "logger"):
        (line,) = (x for x in page.splitlines() if x.startswith(f"| `{group}` |"))
        missing = [n for n in names(group) if f"`{n}`" not in line]
        assert not missing, group


def test_the_glossary_is_in_order() -> None:
    text = (DOCS / "glossary.md").read_text()
    terms = re.findall(r"\n\n([^\n:#]+)\n:   ", text)
    assert len(terms) >= 20
    assert terms == sorted(terms, key=str.lower)
