"""Evaluation, which alone knows the trigger: predictions, metrics, evidence."""
