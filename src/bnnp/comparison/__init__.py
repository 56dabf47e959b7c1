"""Compare inference engines: the same context, prior, noise and targets for each; one table, two pictures.

Methods compared at noise levels of their own, with tuned and untuned settings, or by improper scores say little of inference. Here every
row gets the same padded batch of tasks and the same log-joint, and is scored by the code that scores everything else. What differs is
written in the row: its prior, where it started, how many draws it gave, whether the last layer was integrated out, what it cost.
"""

from bnnp.comparison.results import Comparison, Result
from bnnp.comparison.running import Row, compare

__all__ = ["Comparison", "Result", "Row", "compare"]
