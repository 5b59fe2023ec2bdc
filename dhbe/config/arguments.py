"""Refuse command-line mistakes that Hydra would silently ignore."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dhbe.core.errors import ConfigError
from dhbe.core.paths import CONF

log = logging.getLogger(__name__)

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
LISTS = re.compile(r"""\[[^]]*\]|\{[^}]*\}|'[^']*'|"[^"]*\"""")
"""Parts of a value in which commas make no sweep."""
OF_SWEEPS = re.compile(r"hydra([./])(launcher|sweeper|sweep)\b.*")


def refuse_ignored(words: list[str]) -> None:
    """Check the words behind the command's name.

    Raises:
        ConfigError: something would be ignored; says what to write in its place.
    """
    overrides = [w for w in words if "=" in w and not w.startswith("-")]
    if found := [*misplaced(words), *misspelt(overrides), *unread(overrides)]:
        raise ConfigError("\n".join(found))
    if any(w.split("=")[0] in LOOKS for w in words):
        return
    mode = next((o.partition("=")[2] for o in overrides if o.startswith("hydra.mode=")), "")
    several = mode.upper() == "MULTIRUN" or any(map(asks_for_several, words))
    if found := [*without_effect(overrides, several=several), *replaced(overrides, several)]:
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


def unread(overrides: list[str]) -> Iterator[str]:
    """New keys, made with ``+``, that nothing reads; Hydra refuses unknown ones without it."""
    if not any(o.startswith("+") for o in overrides):
        return
    top_level, of_purify = (_keys(CONF / name) for name in ("config.yaml", "task/purify.yaml"))
    places = [f"paths.{name}" for name in top_level["paths"]]
    known = ["hydra", *top_level, *(p.name for p in CONF.iterdir() if p.is_dir())]
    known += of_purify if any(o.startswith("task=") for o in overrides) else ()
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        top = re.split("[./@]", key)[0]
        used = any(f"${{{top}" in other for other in overrides)
        if override[0] != "+" or used or (top in known and (top != "paths" or key in places)):
            continue
        near = difflib.get_close_matches(key, [*known, *places], n=1)
        remedy = f"did you mean {near[0]}={value}?" if near else "leave it out"
        if top in of_purify:
            remedy = f"write task=purify {key}={value}"
        yield f"{override}: nothing reads {key}; {remedy}"


def _keys(file: Path) -> dict[str, Any]:
    """Top level of a config, without its defaults list."""
    return {k: v for k, v in yaml.safe_load(file.read_text()).items() if k != "defaults"}


def replaced(overrides: list[str], several: bool) -> Iterator[str]:
    """Values that a later one of the same key replaces.

    The last one counts, as in other programs, and the log says so. Of several values in a sweep
    (``seed=0,1 seed=2``) each would be computed, with the value of the last.
    """
    last: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        before = last.get(key, value)
        if before != value and several and "," in LISTS.sub("", before):
            yield f"{key}={before} {key}={value}: given twice; write {key}={before},{value}"
        elif before != value:
            log.warning("%s=%s: replaced by the later %s=%s", key, before, key, value)
        last[key] = value


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
