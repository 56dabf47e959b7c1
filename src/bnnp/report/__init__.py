"""One page that says what was learned, how good it is, and what to do next: a single HTML file that needs nothing else."""

from __future__ import annotations

from bnnp.report.writing import Report, write_report

__all__ = ["Report", "write_report"]
