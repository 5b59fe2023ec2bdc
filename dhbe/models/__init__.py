"""Networks: over normalised inputs, wrapped so that the outside deals in pixels."""

from dhbe.models.normalized import Normalized

__all__ = ["Normalized"]
