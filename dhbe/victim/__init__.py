"""Sources of victims (trained, fine-tuned, read from a file), and their store."""
