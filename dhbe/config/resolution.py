"""Resolve a config completely, before its result is named.

What files answer is filled in: the state of a user's images by ``${content:...}`` while the config
is read, the network of a checkpoint by the function that the config names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.utils import get_object

from dhbe.core.errors import got

Resolved = tuple[dict[str, Any], dict[str, str]]


def resolved(tree: dict[str, Any], choices: Mapping[str, str]) -> Resolved:
    """The config with everything filled in that files answer, and the names of the chosen configs.

    ``complete`` names the function ``(tree, choices) -> (tree, choices)`` that answers what a
    victim of another origin leaves open; without one, nothing heavy is imported.

    Args:
        tree: as from ``schema.plain``.

    Raises:
        ArtefactError: a file is refused.
        ConfigError: config and file contradict each other, or leave something open.
    """
    tree, found = with_trigger(tree, dict(choices))
    if not tree.get("complete"):
        return tree, found
    completed: Resolved = get_object(tree["complete"])(tree, found)
    return completed


def with_trigger(tree: dict[str, Any], choices: dict[str, str]) -> Resolved:
    """``trigger=FILE`` puts the config ``suspected`` in the place of the attack, for this picture.

    Raises:
        ConfigError: another attack is chosen as well, or there are no images to try it on.
    """
    tree = dict(tree)
    suspected = tree.pop("suspected", None)
    if suspected is None or tree.get("trigger") is None:
        return tree, choices
    if choices.get("attack", "none") != "none":
        raise got("trigger", tree["trigger"], f"alone, not with attack={choices['attack']}")
    if "test" in tree["data"] and tree["data"]["test"] is None:
        raise got("data.test", None, f"labelled images to try trigger={tree['trigger']} on")
    options = {k: v for k, v in tree["attack"].items() if k != "_target_"}
    attack = suspected | options | {"path": str(tree["trigger"])}
    return tree | {"attack": attack}, choices | {"attack": "picture"}
