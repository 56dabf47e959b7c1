"""Learning the sawtooth prior."""
