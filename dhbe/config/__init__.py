"""Configs: checked, resolved, named."""
