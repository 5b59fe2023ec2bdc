"""Reports from result folders alone: console table, HTML page of one run, collections of many."""
