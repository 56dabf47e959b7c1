"""Everything the command line does, as functions: fit, resume, evaluate, predict, sample, diagnose, and their answers as files."""

from __future__ import annotations

from bnnp.workflow.answers import Answer, diagnose, evaluate, predict, sample
from bnnp.workflow.fitting import Fit, build_model, fit, plan, resume
from bnnp.workflow.writing import write_dataset, write_table

__all__ = [
    "Answer",
    "Fit",
    "build_model",
    "diagnose",
    "evaluate",
    "fit",
    "plan",
    "predict",
    "resume",
    "sample",
    "write_dataset",
    "write_table",
]
