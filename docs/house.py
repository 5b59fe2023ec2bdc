"""The house as the code builds it: rooms, floors and imports, counted and drawn.

``python docs/house.py`` prints the counts and writes ``docs/house.svg``. The floors are read from
the line of ``docs/architecture.md`` that starts with ``core ->``.
"""

from __future__ import annotations

import ast
import html
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
ZOOS = ("attacks", "defenses")
OUTSIDE = ("report",)
"""Rooms that stand beside the floors: they read result folders, and import no other room."""
PITCH, WIDTH, HEIGHT = 130, 104, 34
"""Of a drawn room, in pixels."""


def floors() -> list[list[str]]:
    """Rooms by floor, the ground first, as the document states them."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    line = next(x for x in text.splitlines() if x.strip().startswith("core ->"))
    return [[r.strip(" `/") for r in floor.split(",")] for floor in line.split("->")]


def sources() -> Iterator[tuple[str, Path]]:
    """(room, file) of every module."""
    for top in ("dhbe", *ZOOS):
        for file in sorted((ROOT / top).rglob("*.py")):
            inside = file.relative_to(ROOT / top)
            yield (top if top in ZOOS else inside.parts[0].removesuffix(".py")), file


def imported(file: Path) -> Iterator[str]:
    """Dotted names of this project that a module imports, lazily or for types alone as well."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{a.name}" for a in node.names)


def room_of(name: str) -> str | None:
    """Room of a dotted name; None outside the project."""
    parts = name.split(".")
    if parts[0] in ZOOS:
        return parts[0]
    if parts[0] != "dhbe" or len(parts) == 1:
        return None
    place = ROOT / "dhbe" / parts[1]
    return parts[1] if place.is_dir() or place.with_suffix(".py").exists() else None


def arrows() -> dict[tuple[str, str], list[Path]]:
    """(importing room, imported room) -> the files that do it."""
    found: dict[tuple[str, str], list[Path]] = {}
    for room, file in sources():
        for name in imported(file):
            other = room_of(name)
            if other and other != room and room != "__init__":
                found.setdefault((room, other), []).append(file)
    return found


def draw(rows: list[list[str]], pairs: dict[tuple[str, str], list[Path]]) -> str:
    """SVG: one row a floor, the ground at the bottom, an arrow for each pair of rooms."""
    width = PITCH * max(map(len, rows)) + 40
    height = 2 * HEIGHT * len(rows) + 40
    at = {}
    for level, rooms in enumerate(rows):
        left = (width - PITCH * len(rooms)) / 2
        for i, room in enumerate(rooms):
            at[room] = (left + PITCH * (i + 0.5), height - 40 - 2 * HEIGHT * level)
    lines = [
        f'<line x1="{at[a][0]:.0f}" y1="{at[a][1]:.0f}" x2="{at[b][0]:.0f}" y2="{at[b][1]:.0f}"/>'
        for a, b in sorted(pairs)
        if a in at and b in at
    ]
    boxes = []
    for room, (x, y) in at.items():
        box = f'x="{x - WIDTH / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{WIDTH}" height="{HEIGHT}"'
        boxes.append(
            f'<rect {box} rx="6"/><text x="{x:.0f}" y="{y + 5:.0f}">{html.escape(room)}</text>'
        )
    style = (
        "line{stroke:#8899aa;stroke-opacity:.45}rect{fill:#eef4fb;stroke:#35608f}"
        "text{font:14px sans-serif;text-anchor:middle;fill:#123}"
    )
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    body = "\n".join([f"<style>{style}</style>", *lines, *boxes])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def main() -> None:
    """Print the counts; write the picture."""
    rows, pairs = floors(), arrows()
    print(f"{len({r for r, _ in sources()} - {'__init__'})} rooms, {len(pairs)} arrows")
    (ROOT / "docs" / "house.svg").write_text(draw(rows, pairs))


if __name__ == "__main__":
    main()
