"""Data: sources, splits, the defender's budgeted access, training batches."""

from dhbe.data.access import Budget, DefenderData
from dhbe.data.images import ImageSet, Resident, Streamed
from dhbe.data.loader import TrainingBatches, augment, even, to_float
from dhbe.data.own import OwnImages
from dhbe.data.splits import Data, Splits, load

__all__ = [
    "Budget",
    "Data",
    "DefenderData",
    "ImageSet",
    "OwnImages",
    "Resident",
    "Splits",
    "Streamed",
    "TrainingBatches",
    "augment",
    "even",
    "load",
    "to_float",
]
