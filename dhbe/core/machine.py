"""Number of cells that this machine computes in parallel."""

from __future__ import annotations

import os


def cells_at_once(given: int) -> int:
    """``given``; if that is 0, one per GPU, or without any one per core, at most 8."""
    import torch

    return given or torch.cuda.device_count() or min(8, os.cpu_count() or 1)
