"""Refuse command-line mistakes that Hydra would silently ignore."""

from __future__ import annotations

import re
from collections.abc import Iterator

from dhbe.core.errors import ConfigError

LOOKS = (
    *("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info"),
    *("-sc", "--shell-completion"),
)
"""Options under which nothing is run."""
VALUED = (
    *("-c", "--cfg", "-p", "--package", "-cp", "--config-path", "-cn", "--config-name"),
    *("-cd", "--config-dir", "--experimental-rerun", "-i", "--info"),
)
"""Options of Hydra whose value may be the next word."""
GROUPS = ("launcher", "sweeper", "job_logging", "hydra_logging", "env", "help", "output")
"""Config groups of Hydra."""
OF_SWEEPS = re.compile(r"hydra([./])(launcher|sweeper|sweep)\b.*")


def refuse_ignored(words: list[str]) -> None:
    """Check the words behind the command's name.

    Raises:
        ConfigError: something would be ignored; says what to write in its place.
    """
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    if found := [*misplaced(words), *misspelt(overrides)]:
        raise ConfigError("\n".join(found))
    if any(w.split("=")[0] in LOOKS for w in words):
        return
    mode = next((o.partition("=")[2] for o in overrides if o.startswith("hydra.mode=")), "")
    several = mode.upper() == "MULTIRUN" or any(map(asks_for_several, words))
    if found := list(without_effect(overrides, several=several)):
        raise ConfigError("\n".join(found))


def asks_for_several(word: str) -> bool:
    """Whether it is ``-m`` or ``--multirun``, which may be shortened."""
    return word == "-m" or ("--multirun".startswith(word) and len(word) > len("--"))


def misplaced(words: list[str]) -> Iterator[str]:
    """Overrides behind an option that has others before it: they are not read."""
    groups: list[list[str]] = [[]]
    before = ""
    for word in words:
        if word.startswith("-"):
            groups.append([])
        elif before not in VALUED or "=" in word:
            groups[-1].append(word)
        before = word
    given = [g for g in groups if g]
    if len(given) > 1:
        rest = " ".join(w for g in given[1:] for w in g)
        yield f"{rest}: would not be read; write all key=value behind -m and other options"


def misspelt(overrides: list[str]) -> Iterator[str]:
    """A group named like a value, and more than one sweep."""
    sweeps: list[str] = []
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = key.removeprefix("hydra.")
        if key == f"hydra.{group}" and group in GROUPS:
            yield f"{override}: {key} is a config group; write hydra/{group}={value}"
        if key == "sweep":
            sweeps += value.split(",")
    if len(sweeps) > 1:
        yield f"+sweep={','.join(sweeps)}: one sweep at a time; call the command once for each"


def without_effect(overrides: list[str], *, several: bool) -> Iterator[str]:
    """Options of single runs in a sweep, and of sweeps in a single run.

    Args:
        several: whether it is a sweep.
    """
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        if several and key == "hydra.run.dir":
            yield (
                f"{override}: has no effect with --multirun; write paths.results={value} or "
                f"hydra.sweep.dir={value}"
            )
        elif not several and (OF_SWEEPS.fullmatch(key) or key == "sweep"):
            yield f"{override}: has no effect without --multirun; add -m"
