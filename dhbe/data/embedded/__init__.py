"""The embedded data and its maker."""
