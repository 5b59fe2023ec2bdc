"""Tests: ``python -m pytest``."""
