"""The defense zoo: one file, one YAML, one class per defense."""
