"""The commands: ``dhbe`` runs one composed config, ``dhbe-purify FILE`` purifies a checkpoint."""

from __future__ import annotations

import os

from dhbe.core.errors import ConfigError
from dhbe.core.exit_status import guarded

__all__ = ["guarded", "purify_arguments"]


def purify_arguments(given: list[str]) -> list[str]:
    """``FILE key=value ...`` of ``dhbe-purify`` -> arguments of ``dhbe``; options stay as they are.

    Raises:
        ConfigError: no file is named.
    """
    if given and given[0].startswith("-"):
        return ["task=purify", *given]
    if not given or ("=" in given[0] and not os.path.exists(given[0])):
        raise ConfigError(
            "dhbe-purify: name the checkpoint first: dhbe-purify FILE [key=value ...]"
        )
    quoted = given[0].replace("\\", "\\\\").replace("'", "\\'")
    return ["task=purify", f"checkpoint='{quoted}'", *given[1:]]
