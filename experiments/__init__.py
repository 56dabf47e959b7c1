"""One folder for each result: a README with command, time and numbers, a configuration, a run."""
