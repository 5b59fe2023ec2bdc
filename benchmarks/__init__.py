"""Speed and size, measured against named baselines; run with ``python -m benchmarks.NAME``."""
