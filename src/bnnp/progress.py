"""A line that says how far a long computation is, for people who wait."""

from __future__ import annotations

import math
import sys
import time

__all__ = ["ProgressLine"]


class ProgressLine:
    """Show a line of progress on standard error, rewritten in place on a terminal."""

    def __init__(self, steps: int, shown: bool) -> None:
        self.steps, self.shown, self.start, self.last, self.first = steps, shown, time.monotonic(), 0.0, -1

    def show(self, step: int, text: str) -> None:
        """Show the step and a text, at most five times a second (on no terminal, every 15 seconds)."""
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if not self.shown or (step < self.steps and now - self.last < (0.2 if terminal else 15.0)):
            return
        self.last = now
        self.first = step if self.first < 0 else self.first
        left = (now - self.start) / max(step - self.first, 1) * (self.steps - step) if step > self.first else math.nan
        line = f"step {step}/{self.steps}  {text}" + (f"  {left:.0f} s left" if math.isfinite(left) and step < self.steps else "")
        sys.stderr.write(f"\r{line:<78}" if terminal else line + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """End the line."""
        if self.shown and sys.stderr.isatty() and self.last:
            sys.stderr.write("\n")
