"""Where tasks come from: synthetic processes here, and readers of the user's own files beside them.

Every source ends in a list of pairs (x, y), which is what `bnnp.meta_train` and `bnnp.evaluation.evaluate` accept.
"""

from __future__ import annotations

from bnnp.data.synthetic import Heaviside, KnownBNN, Process, Sawtooth, SquaredExponentialGP, SyntheticTask

__all__ = ["Heaviside", "KnownBNN", "Process", "Sawtooth", "SquaredExponentialGP", "SyntheticTask"]
