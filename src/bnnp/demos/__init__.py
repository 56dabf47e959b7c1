"""Complete stories on real and made-up data, each with the rivals that a reader would ask for."""
