"""A page in the browser where data are clicked in and the posterior moves with them.

`explore(run)` serves it on this machine only. `Session` is one page's task without any server: points are added, moved and removed, and
the prediction is read off as plain numbers.
"""

from __future__ import annotations

from bnnp.explorer.server import Explorer, Server, explore
from bnnp.explorer.session import Session
from bnnp.explorer.subject import Subject

__all__ = ["Explorer", "Server", "Session", "Subject", "explore"]
