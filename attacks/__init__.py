"""The attack zoo: one file, one YAML, one class per attack."""
