"""What methods share: losses, masks, patterns, unlearning, selection."""
