"""Locate the weights in a nested checkpoint, and read the plain values beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dhbe.checkpoint.files import MAX_TENSORS, Place, WeightFile
from dhbe.checkpoint.pickles import Opaque, Refused, shown

NESTS = (
    *("model", "state_dict", "net", "network", "model_state_dict", "netC", "weights", "params"),
    *("model_state", "model_weights", "classifier", "checkpoint"),
)
"""Keys under which checkpoints keep their state dict, first choice first."""
COPIES = re.compile(r"(^|_)(ema|teacher|student|avg|averaged|swa|best|shadow)(_|$)")
"""Words in keys of what exists beside a network: chosen only where nothing else is."""
PREFIXES = (
    *("module", "model", "network", "net", "backbone", "_orig_mod", "1", "classifier"),
    *("student", "teacher", "ema", "model_ema", "ema_model", "base_model", "_forward_module"),
)
"""What wrappers put before every key; ``1`` is the network behind a normalisation layer."""
VAGUE = ("1", "backbone", "classifier")
"""Wrappers only if no convolution lies outside of them; else parts of a network."""
KERNEL = re.compile(r"(.*\.)?(weight(_orig|_v|\.original\d?)?|kernel)")
"""Names of weights; optimizers and data have others."""
MAX_NESTING = 6
MAX_LOOKED = 20_000
"""Values that are looked at in search of weights."""
MAX_NAME = 300
"""Characters of a weight's name; the longest of known networks have 80."""
MAX_LISTED = 12
STATISTICS = ("mean", "std")
FACT_GROUPS = ("args", "hyper_parameters", "config", "pretrained_cfg", "opt", "cfg")


class Found(NamedTuple):
    """One set of weights in a file.

    Attributes:
        path: keys that lead to it, joined by dots; empty on top.
        tensors: all of the dict that holds it, by their keys there.
        prefix: of its own keys, where the dict holds several networks.
    """

    path: str
    tensors: dict[str, Place]
    prefix: str = ""

    @property
    def rank(self) -> int:
        """Sort key: smaller is more likely to be the network in use."""
        words = [w for w in self.path.split(".") if w]
        return max((rank(w) for w in words), default=-1)


def rank(word: str) -> int:
    """Penalty of a key: averaged and teacher copies rank behind the plain network."""
    if word in NESTS:
        return NESTS.index(word)
    return len(NESTS) + (2 if COPIES.search(word) else 1)


def weights_in(file: WeightFile, key: str | None) -> Found:
    """The weights under ``key``, or the most likely ones.

    Args:
        key: as in ``Found.path``.

    Raises:
        Refused: there are none, or several are as likely; lists their keys.
    """
    every = list(searched(file))
    if not every:
        raise Refused(
            f"no state dict of tensors, neither on top nor under {', '.join(NESTS)}; keys: "
            f"{keys_in(file.content)}; torch.save(model.state_dict(), 'weights.pt') writes one"
        )
    listed = ", ".join(shown(f.path) or "(top)" for f in every[:MAX_LISTED])
    if key is not None:
        for found in every:
            if found.path == key:
                return found
        raise Refused(f"no weights under the key '{shown(key)}'; there are: {listed}")
    best = min(f.rank for f in every)
    likeliest = [f for f in every if f.rank == best]
    if len(likeliest) > 1:
        raise Refused(f"several sets of weights; name one by key=, of: {listed}")
    return likeliest[0]


def searched(file: WeightFile) -> Iterator[Found]:
    """All sets of weights in a nesting of dicts, lists and tuples, outermost first."""
    todo: list[tuple[str, Any, int]] = [("", file.content, 0)] if nested(file.content) else []
    seen: set[int] = set()
    looked = 0
    while todo:
        path, value, depth = todo.pop(0)
        looked += len(value)
        if looked > MAX_LOOKED:
            return
        entries = list(value.items() if isinstance(value, dict) else enumerate(value))
        if isinstance(value, dict):
            yield from branches(path, state_dict(value))
        for key, inner in entries if depth < MAX_NESTING else ():
            if nested(inner) and id(inner) not in seen and short(key):
                seen.add(id(inner))
                todo.append((f"{path}.{key}" if path else str(key), inner, depth + 1))


def nested(value: Any) -> bool:
    """Whether weights may lie inside a value."""
    return isinstance(value, (dict, list, tuple)) and not isinstance(value, Place)


def short(key: object) -> bool:
    """Whether a key can be part of a path that a user types."""
    return type(key) is int or (isinstance(key, str) and 0 < len(key) <= MAX_NAME)


def state_dict(value: dict[Any, Any]) -> dict[str, Place]:
    """The tensors of a dict that is a state dict; empty if it is none.

    Raises:
        Refused: it has too many, or too long names.
    """
    tensors = {k: v for k, v in value.items() if isinstance(v, Place)}
    if 2 * len(tensors) <= len(value):  # odd entries beside weights stay as they are
        return {}
    if not any(
        isinstance(k, str) and len(p.shape) >= 2 and KERNEL.fullmatch(k[-MAX_NAME:])
        for k, p in tensors.items()
    ):
        return {}
    if any(not isinstance(k, str) or len(k) > MAX_NAME for k in tensors):
        raise Refused(f"a weight without a name, or one of more than {MAX_NAME} letters")
    if len(tensors) > MAX_TENSORS:
        raise Refused(f"{len(tensors):,} tensors; at most {MAX_TENSORS:,}")
    return tensors


def branches(path: str, tensors: dict[str, Place]) -> Iterator[Found]:
    """A state dict, split into the networks that it holds side by side."""
    if not tensors:
        return
    heads = dict.fromkeys(k.split(".")[0] for k, p in tensors.items() if len(p.shape) == 4)
    if len(heads) > 1 and all(map(is_wrapper, heads)):
        for head in heads:
            yield Found(f"{path}.{head}" if path else head, tensors, f"{head}.")
    else:
        yield Found(path, tensors)


def is_wrapper(word: str) -> bool:
    """Whether the first part of a key may be the prefix of a whole network."""
    return (word in PREFIXES and word not in VAGUE) or COPIES.search(word) is not None


def keys_in(content: Any) -> str:
    """The first keys of a file's content, for messages."""
    if not isinstance(content, dict):
        return f"none, it is a {type(content).__name__}"
    listed = ", ".join(shown(k, 40) for k in list(content)[:MAX_LISTED])
    return listed + (", ..." if len(content) > MAX_LISTED else "")


def wrapper(keys: Mapping[str, Place], prefix: str = "") -> str:
    """The prefix that wrappers put before most keys; empty if there is none.

    Args:
        prefix: known to be one.
    """
    found = prefix
    for _ in range(MAX_NESTING):
        inside = [k for k in keys if k.startswith(found) and not is_statistic(k, keys[k])]
        longer = [f"{found}{p}." for p in PREFIXES]
        counts = {p: sum(k.startswith(p) for k in inside) for p in longer}
        best = max(longer, key=lambda p: counts[p])
        if 2 * counts[best] <= len(inside):
            break
        outside = [k for k in inside if not k.startswith(best) and len(keys[k].shape) == 4]
        if outside and best.removeprefix(found).rstrip(".") in VAGUE:
            break
        found = best
    return found


def is_statistic(key: str, place: Place) -> bool:
    """Whether a tensor is the mean or deviation of a normalisation layer: up to 4 numbers."""
    name = key.rpartition(".")[2].lstrip("_")
    count = place.nbytes // place.dtype.itemsize
    return name in STATISTICS and 1 <= count <= 4 and place.dtype.is_floating_point


def listed(text: str) -> Any:
    """The numbers of a text like ``[0.5, 0.5]``, which is how safetensors can hold them."""
    if not re.fullmatch(r"\[[\d.,\s]{1,100}\]", text, re.ASCII):
        return text
    try:
        return [float(n) for n in text.strip("[]").split(",")]
    except ValueError:
        return text


def facts(content: Any) -> Iterator[tuple[str, Any]]:
    """Plain values beside the weights: on top, in ``args``, in ``hyper_parameters``."""
    if not isinstance(content, dict):
        return
    for key in FACT_GROUPS:
        inner = content.get(key)
        if isinstance(inner, Opaque):
            inner = inner.state if isinstance(inner.state, dict) else inner.items
        if isinstance(inner, dict):
            content = {**inner, **content}
    for key, value in content.items():
        several = list(value) if isinstance(value, (list, tuple)) and len(value) <= 4 else [value]
        kinds = (int, float) if isinstance(value, (list, tuple)) else (int, float, str)
        if all(isinstance(v, kinds) and len(str(v)) <= MAX_NAME for v in several):
            yield str(key), value
