"""Many runs: plans, workers, failures, status, search."""
