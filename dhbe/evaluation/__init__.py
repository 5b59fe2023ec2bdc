"""What alone knows the trigger: predictions, metrics, evidence."""
