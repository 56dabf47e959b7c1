"""The study of priors in other hands: its pieces by hand, and a run in miniature."""
