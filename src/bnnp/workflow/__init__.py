"""Everything the command line does, as functions: describe, fit, resume, evaluate, predict, sample, diagnose."""

from __future__ import annotations

from bnnp.workflow.fitting import Fit, build_model, fit, plan, resume

__all__ = ["Fit", "build_model", "fit", "plan", "resume"]
