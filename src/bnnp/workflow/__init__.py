"""Everything the command line does, as functions of paths: fit, resume, evaluate, predict, sample, diagnose, and what they need."""

from __future__ import annotations

from bnnp.workflow.answers import Answer
from bnnp.workflow.fitting import Fit, build_model, plan
from bnnp.workflow.verbs import Judged, diagnose, evaluate, fit, judged, open_data, predict, resume, sample
from bnnp.workflow.writing import write_dataset, write_table

__all__ = [
    "Answer",
    "Fit",
    "Judged",
    "build_model",
    "diagnose",
    "evaluate",
    "fit",
    "judged",
    "open_data",
    "plan",
    "predict",
    "resume",
    "sample",
    "write_dataset",
    "write_table",
]
