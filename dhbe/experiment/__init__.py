"""One run, from config to result folder."""
