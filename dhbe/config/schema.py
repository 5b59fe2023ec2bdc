"""Configs fail before any work starts: every node is checked against its component's signature."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from dhbe.core.errors import ConfigError, DHBEError, got, out_of_memory

TARGET = "_target_"
GROUPS = ("data", "model", "attack", "budget", "defense", "victim", "trainer")
"""Config groups that every run chooses from."""
SUPPLIED: dict[str, set[str]] = {
    "attack": {"spec"},
    "logger": {"save_dir"},
    "model": {"classes", "channels", "image_size"},
}
"""Parameters that the pipeline fills in, by config group."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One constructor parameter: its type and whether the config must give it."""

    annotation: Any
    required: bool


def locate(name: str) -> Any:
    """The class or function with this dotted name.

    ``attacks.badnets.BadNets`` lies in the checkout or, once installed, in ``dhbe.attacks``.
    """
    room = name.partition(".")[0]
    given = find_spec(room)
    elsewhere = given is None or given.origin is None  # a mere folder of that name is none of ours
    if elsewhere and find_spec(f"dhbe.{room}") is not None:
        name = f"dhbe.{name}"
    return get_object(name)


def schema(component: Any) -> dict[str, Parameter]:
    """Parameters of a class or function; ``**options: Unpack[TypedDict]`` is expanded."""
    function = component.__init__ if inspect.isclass(component) else component
    try:
        hints = get_type_hints(function, include_extras=True)
    except NameError:  # a library whose annotations exist for type checkers only
        hints = {}
    found: dict[str, Parameter] = {}
    for name, p in inspect.signature(component).parameters.items():
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            if not get_args(hints.get(name)):
                continue
            (options,) = get_args(hints[name])
            for key, annotation in get_type_hints(options, include_extras=True).items():
                required = key in options.__required_keys__
                found[key] = Parameter(annotation=annotation, required=required)
        elif name != "self":
            annotation = hints.get(name, Any)
            found[name] = Parameter(annotation=annotation, required=p.default is p.empty)
    return found


def errors_in(node: Any, path: str, supplied: frozenset[str] = frozenset()) -> list[str]:
    """Messages for all that is wrong at and below a config node (plain dicts and lists)."""
    if not isinstance(node, dict):
        return []
    found: list[str] = []
    for key, value in node.items():
        found += errors_in(value, f"{path}.{key}")
    if TARGET not in node:
        return found
    try:
        parameters = schema(locate(node[TARGET]))
    except (HydraException, ImportError, AttributeError, ValueError) as error:
        return [*found, f"{path}.{TARGET}={node[TARGET]}: cannot be imported ({error})"]
    given = {k: v for k, v in node.items() if not (k.startswith("_") and k.endswith("_"))}
    for key in given.keys() - parameters.keys():
        found.append(f"{path}.{key}={given[key]}: unknown; allowed are {sorted(parameters)}")
    for key, parameter in parameters.items():
        if key in given:
            found += _type_errors(given[key], parameter.annotation, f"{path}.{key}")
        elif parameter.required and key not in supplied:
            found.append(f"{path}.{key}: missing; {path} needs {sorted(parameters)}")
    return found


def _type_errors(value: Any, annotation: Any, path: str) -> list[str]:
    if isinstance(value, dict) and TARGET in value:
        return []  # an object made from the config; its own arguments are checked below it
    if value == "???":
        return [f"{path}: required; set {path}=..."]
    try:
        try:
            adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
        except PydanticUserError:  # a dataclass brings its own config
            adapter = TypeAdapter(annotation)
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        reasons = "; ".join(e["msg"] for e in error.errors())
        return [f"{path}={value}: {reasons}"]
    return []


def plain(config: DictConfig) -> dict[str, Any]:
    """Resolved config as plain containers, without Hydra's own part.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    content = {k: v for k, v in config.items_ex(resolve=False) if k != "hydra"}
    try:
        resolved = OmegaConf.to_container(
            OmegaConf.create(content), resolve=True, throw_on_missing=False
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {error.msg}") from error
    assert isinstance(resolved, dict)
    return {str(k): v for k, v in resolved.items()}


def value_errors(tree: dict[str, Any]) -> Iterator[str]:
    """Mistakes that show without importing a component, which takes seconds."""
    seed = tree.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        yield f"seed={seed}: expected an integer, 0 or more"
    data, attack = tree.get("data"), tree.get("attack")
    if not isinstance(data, dict) or not isinstance(attack, dict):
        return
    classes, target, rate = (
        data.get("classes"),
        attack.get("target_class"),
        attack.get("poison_rate"),
    )
    if isinstance(classes, int) and isinstance(target, int) and not 0 <= target < classes:
        allowed = f"a class of the data set, 0..{classes - 1}"
        yield str(got("attack.target_class", target, allowed))
    if isinstance(rate, (int, float)) and not 0 <= rate <= 1:
        yield str(got("attack.poison_rate", rate, "a fraction of the training images, 0..1"))


def refuse_early(tree: dict[str, Any]) -> None:
    """Check what can be checked before torch is imported.

    Raises:
        ConfigError: lists everything that is wrong, one line each.
    """
    if found := list(value_errors(tree)):
        raise ConfigError("\n".join(found))


def validate(tree: dict[str, Any], groups: Iterable[str] = GROUPS) -> None:
    """Check the whole config.

    Args:
        tree: as from ``plain``.
        groups: those that must name a component.

    Raises:
        ConfigError: lists everything that is wrong, one line each.
    """
    found: list[str] = []
    for group in groups:
        node = tree.get(group)
        if not isinstance(node, dict) or not isinstance(node.get(TARGET), str):
            found.append(str(got(group, node, f"one of the configs in conf/{group}")))
    for group, node in tree.items():
        found += errors_in(node, group, frozenset(SUPPLIED.get(group, ())))
    named = {message.split("=")[0] for message in found}
    found += [message for message in value_errors(tree) if message.split("=")[0] not in named]
    if found:
        raise ConfigError("\n".join(sorted(found)))


def build(node: dict[str, Any], **supplied: Any) -> Any:
    """The object that a validated config node names, with those below it.

    Hydra's ``instantiate`` would look for ``${...}`` in every text once more; by now the config is
    resolved, and some of its texts come from other people's files.

    Args:
        supplied: arguments that no config holds.

    Raises:
        ConfigError: the constructor refuses its arguments.
    """
    given = {k: _built(v) for k, v in node.items() if k != TARGET}
    try:
        return locate(node[TARGET])(**given, **supplied)
    except (DHBEError, OSError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise ConfigError(f"{node[TARGET]}: {error}") from error


def _built(value: Any) -> Any:
    if isinstance(value, dict):
        return build(value) if TARGET in value else {k: _built(v) for k, v in value.items()}
    return [_built(v) for v in value] if isinstance(value, list) else value
