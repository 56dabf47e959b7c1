"""Which family of priors when: the same data and budget for every prior the package has."""
