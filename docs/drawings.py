"""The pictures of the concepts page: ``python docs/drawings.py`` writes ``docs/pictures/*.svg``.

Text and lines are grey and boxes are transparent, so that one file suits light and dark pages.
"""

from __future__ import annotations

import html
from pathlib import Path

PICTURES = Path(__file__).parent / "pictures"
INK, BLUE, ORANGE, GREEN = "#808080", "#2b8cc4", "#e07b39", "#2a9d78"
BOLD = ' font-weight="bold"'
WIDTH, LINE = 760, 18
"""Of a picture, and of a line of text, in pixels."""


def box(x: int, y: int, w: int, h: int, text: str, colour: str = INK) -> str:
    """A rounded box with centred lines of text, the first one bold."""
    lines = text.split("\n")
    top = y + h / 2 - LINE * (len(lines) - 1) / 2 + 5
    spans = "".join(
        f'<text x="{x + w / 2}" y="{top + LINE * i}" text-anchor="middle" fill="{colour}"'
        f"{BOLD * (i == 0)}>{html.escape(line)}</text>"
        for i, line in enumerate(lines)
    )
    shade = f'fill="{colour}" fill-opacity="0.08" stroke="{colour}" stroke-width="1.5"'
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" {shade}/>{spans}'


def arrow(x1: int, y1: int, x2: int, y2: int, text: str = "") -> str:
    """A line with a head, and a label above its middle."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{INK}" stroke-width="1.5"'
    label = note((x1 + x2) // 2, (y1 + y2) // 2 - 7, text) if text else ""
    return f'{line} marker-end="url(#head)"/>{label}'


def note(x: int, y: int, text: str, colour: str = INK) -> str:
    """Small centred text."""
    where = f'x="{x}" y="{y}" text-anchor="middle" font-size="12"'
    return f'<text {where} fill="{colour}">{html.escape(text)}</text>'


def picture(name: str, height: int, title: str, *parts: str) -> None:
    """Write one SVG."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>'
    )
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="14"><title>{html.escape(title)}</title>'
        f"{head}{''.join(parts)}</svg>\n"
    )
    (PICTURES / f"{name}.svg").write_text(svg)


def threat_model() -> None:
    """Who knows what."""
    picture(
        "threat_model",
        250,
        "Threat model: attacker, defender, evaluation",
        box(10, 40, 190, 84, "Attacker\ntraining data or training\ntrigger T, goal class", ORANGE),
        box(285, 40, 190, 84, "Victim\nnetwork with a backdoor", ORANGE),
        box(560, 40, 190, 84, "Defender\nsuspect + budgeted data\nno trigger, no test set", BLUE),
        arrow(200, 82, 280, 82, "trains"),
        arrow(475, 82, 555, 82, "suspect"),
        box(285, 170, 190, 64, "Evaluation\ntrigger and test set", GREEN),
        arrow(105, 124, 280, 195),
        note(120, 175, "trigger, goal"),
        arrow(655, 124, 480, 195),
        note(650, 175, "purified network"),
        arrow(380, 124, 380, 166),
    )


def budgets() -> None:
    """How the data are split."""
    picture(
        "budgets",
        190,
        "Split of a data set and what budgets grant",
        note(300, 20, "official training set, split once per data set"),
        box(10, 30, 520, 56, "attacker's training set, 95 %", ORANGE),
        box(534, 30, 56, 56, "pool\n5 %", BLUE),
        box(620, 30, 130, 56, "test set\nevaluation only", GREEN),
        arrow(562, 86, 562, 118),
        box(
            390, 120, 344, 56, "budget: pct1, pct5, one_per_class, …\nwhat a defense receives", BLUE
        ),
        arrow(200, 86, 200, 118),
        box(
            40,
            120,
            320,
            56,
            "budget: poisoned, holdout5\nthe poisoned set, as the victim saw it",
            BLUE,
        ),
    )


def metrics() -> None:
    """From images to rates."""
    picture(
        "metrics",
        230,
        "ACC, ASR and RA",
        box(10, 20, 190, 60, "clean test images\nall of them"),
        box(10, 130, 190, 80, "triggered test images\nwithout those whose true\nclass is the goal"),
        box(285, 75, 170, 80, "network\npredicts a class"),
        arrow(200, 50, 280, 95),
        arrow(200, 170, 280, 135),
        box(560, 10, 190, 54, "true class: ACC\nhigher is better", BLUE),
        box(560, 88, 190, 54, "goal class: ASR\nlower is better", ORANGE),
        box(560, 166, 190, 54, "true class: RA\nhigher is better", BLUE),
        arrow(455, 95, 555, 40, "clean"),
        arrow(455, 115, 555, 115, "triggered"),
        arrow(455, 135, 555, 190, "triggered"),
    )


def selection() -> None:
    """Three ways to choose a setting."""
    picture(
        "selection",
        170,
        "fixed, validation and oracle selection",
        box(10, 20, 235, 84, "fixed\nthe value is in the config\nbefore the run", BLUE),
        box(262, 20, 235, 84, "validation\nbest on a fifth of the\ngranted clean images", BLUE),
        box(514, 20, 235, 84, "oracle\nbest on the test set:\nno defender can do this", ORANGE),
        note(250, 138, "comparable with each other", BLUE),
        note(632, 138, "marked in every table", ORANGE),
    )


if __name__ == "__main__":
    for draw in (threat_model, budgets, metrics, selection):
        draw()
