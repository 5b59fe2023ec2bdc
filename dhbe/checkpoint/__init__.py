"""Foreign checkpoints: read without executing code, matched by name and shape, written back."""

from dhbe.checkpoint.inference import completed, inferred
from dhbe.checkpoint.loading import Checkpoint, CheckpointFile

__all__ = ["Checkpoint", "CheckpointFile", "completed", "inferred"]
