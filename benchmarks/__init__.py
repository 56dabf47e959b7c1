"""Scripts that print a table: the package against a naive twin and the machine's ceiling, as ratios of one run."""
