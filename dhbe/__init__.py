"""DHBE: plant backdoors in image classifiers, erase them, and tell honestly which erasure works."""

__version__ = "0.1.0"
