"""The explorer as a local web server: one page, a few JSON verbs, and nobody else let in.

It listens on 127.0.0.1 only. Every address begins with a random token; a request without it is refused, and so is one whose Host header
names anything but this machine, which is how a page of another site would reach it through a name of its own. Pages may load nothing from
elsewhere. The work is done in threads, one change at a time for each page.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
import threading
import traceback
import webbrowser
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from bnnp.data.collection import Collection
from bnnp.explorer import wire
from bnnp.explorer.session import Session
from bnnp.explorer.subject import Subject
from bnnp.runs import Run

__all__ = ["Explorer", "Server", "explore"]

HOST = "127.0.0.1"
MOST_BYTES = 2**20
MOST_PAGES = 32
"""Pages whose state is kept; the one not used for longest is forgotten."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TYPES = {
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml",
}
PAGE = re.compile(r"[A-Za-z0-9_-]{8,64}")


class Explorer:
    """Answer the verbs of all pages, without HTTP.

    Arguments:
        run: what is explored.
        data: tasks to load.
        samples: number of particles at the start.

    Example:
        >>> from bnnp import BNNP
        >>> explorer = Explorer(Run.of(BNNP(1, 1, hidden=(4,))), samples=4)
        >>> explorer.handle("change", {"page": "page-one", "do": "add", "x": [0.0], "y": [1.0]})["count"]
        1
    """

    def __init__(self, run: Run, data: Collection | None = None, samples: int = 64) -> None:
        self.subject, self.samples = Subject(run, data), samples
        Session(self.subject, samples)  # so that a wrong number is refused here, and not by the first page
        self._pages: OrderedDict[str, tuple[Session, threading.Lock]] = OrderedDict()
        self._lock = threading.Lock()

    def handle(self, verb: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a request of a page.

        Arguments:
            verb: "open", "change", "diagnose" or "tasks".
            body: with "page", the name that a page gave itself, "seq", a number that is sent back, and what the verb needs.

        Raises:
            ValueError: anything that is not as expected; the state stays as it was.
            KeyError: a verb that is not known.
        """
        answer = {"open": self._open, "change": self._change, "diagnose": self._diagnose, "tasks": self._tasks}[verb]
        return {**answer(body), "seq": wire.whole(body, "seq", 0, 2**53, 0)}

    def _page(self, body: Mapping[str, Any]) -> tuple[Session, threading.Lock]:
        name = wire.text(body, "page", 64)
        if not PAGE.fullmatch(name):
            raise ValueError(f"Expected page as 8 to 64 letters, digits, - and _. Got {name!r}.")
        with self._lock:
            if name not in self._pages:
                self._pages[name] = (Session(self.subject, self.samples), threading.Lock())
            self._pages.move_to_end(name)
            while len(self._pages) > MOST_PAGES:
                self._pages.popitem(last=False)
            return self._pages[name]

    def _open(self, body: Mapping[str, Any]) -> dict[str, Any]:
        session, lock = self._page(body)
        with lock:
            return {"subject": self.subject.to_dict(), "state": session.describe(), "answer": session.answer()}

    def _change(self, body: Mapping[str, Any]) -> dict[str, Any]:
        session, lock = self._page(body)
        verb, preview = wire.text(body, "do", 20), wire.flag(body, "preview")
        mark = wire.text(body, "mark", 60, "")
        with lock:
            before = session.state
            # A page that got no answer asks again: what was done once is not done twice.
            if not mark or mark != session.mark:
                session.apply(verb, body)
                session.mark = mark
            found = session.answer(preview)
            if verb in ("undo", "redo", "load", "clear"):
                found["state"] = session.describe()
            elif session.state is not before and verb not in ("add", "move"):
                found["state"] = session.describe(targets=False)
            return found

    def _diagnose(self, body: Mapping[str, Any]) -> dict[str, Any]:
        session, lock = self._page(body)
        with lock:
            # It takes longer than a change may, so changes do not wait for it: it works on what is there now.
            still = session.snapshot()
        return still.diagnose()

    def _tasks(self, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.subject.names(wire.text(body, "search", 200, ""))


class Server:
    """Serve an explorer on 127.0.0.1 until it is stopped.

    Arguments:
        explorer: what answers.
        port: to listen on; 0 for any that is free.

    Raises:
        ImportError: starlette or uvicorn is missing.
        OSError: the port is in use.
    """

    def __init__(self, explorer: Explorer, port: int = 0) -> None:
        try:
            import uvicorn
        except ImportError as error:
            raise ImportError('The explorer needs starlette and uvicorn. Run: pip install "bnnp[explore]".') from error
        self.explorer, self.token = explorer, secrets.token_urlsafe(24)
        self._socket = _listening(port)
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            _application(self), log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
            timeout_graceful_shutdown=10, timeout_keep_alive=30, proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Return the address of the page, with its token."""
        return f"http://{HOST}:{self.port}/{self.token}/"

    def run(self) -> None:
        """Serve until Ctrl-C."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def start(self) -> Server:
        """Serve in a thread and return at once."""
        self._thread = threading.Thread(target=self.run, name="bnnp-explorer", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop serving, and wait for the thread of `start`."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(10)

    def __enter__(self) -> Server:
        """Serve in a thread."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stop serving."""
        self.stop()


def _listening(port: int) -> socket.socket:
    """Return a socket that listens on a port of this machine."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ValueError(f"Expected port as a number from 0 to 65535. Got {port!r}.")
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
        found.listen(128)
    except OSError as error:
        found.close()
        why = error.strerror or str(error)
        raise OSError(
            error.errno, f"Expected a free port on {HOST}. Got {port}: {why}. Choose another, or use --port 0 for any that is free."
        ) from None
    return found


def _application(server: Server) -> Any:
    """Return the application: static files and verbs below the token, refusals elsewhere."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.routing import Route

    def reply(content: bytes, kind: str, status: int = 200) -> Response:
        return Response(content, status, {**HEADERS, "Content-Type": kind})

    def said(value: Mapping[str, Any], status: int = 200) -> Response:
        return reply(json.dumps(value, allow_nan=False, separators=(",", ":")).encode(), "application/json", status)

    async def body_of(request: Request) -> bytes | None:
        """Return the body, or None where it is too large."""
        read = bytearray()
        async for chunk in request.stream():
            read += chunk
            if len(read) > MOST_BYTES:
                return None
        return bytes(read)

    async def get(request: Request, name: str) -> Response:
        found = _static().get(name or "index.html")
        if request.method not in ("GET", "HEAD"):
            return said({"error": f"Expected GET. Got {request.method}."}, 405)
        return reply(found[0], found[1]) if found else said({"error": f"Expected a part of the page. Got {name!r}."}, 404)

    async def post(request: Request, verb: str) -> Response:
        if request.method != "POST":
            return said({"error": f"Expected POST. Got {request.method}."}, 405)
        if not request.headers.get("content-type", "").startswith("application/json"):
            return said({"error": "Expected content of type application/json."}, 415)
        body = await body_of(request)
        if body is None:
            return said({"error": f"Expected at most {MOST_BYTES} bytes. Got more."}, 413)
        status, answer = await run_in_threadpool(_answered, server.explorer.handle, verb, body)
        return said(answer, status)

    async def everything(request: Request) -> Response:
        refusal = _refusal(server, request.headers.get("host", ""), request.headers.get("origin"), request.url.path)
        if refusal:
            return said({"error": refusal}, 403)
        name = request.url.path[len(server.token) + 2 :]
        try:
            return await (post(request, name[4:]) if name.startswith("api/") else get(request, name))
        except ClientDisconnect:
            return said({"error": "The page went away."}, 400)

    methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
    return Starlette(routes=[Route("/{path:path}", everything, methods=methods)])


def _refusal(server: Server, host: str, origin: str | None, path: str) -> str:
    """Return why a request is refused, or nothing."""
    hosts = {f"{name}:{server.port}" for name in (HOST, "localhost")}
    if host.lower() not in hosts:
        return "Expected a request to this machine by its own name. Got another Host."
    if origin is not None and origin.lower() not in {f"http://{name}" for name in hosts}:
        return "Expected a request of the explorer's own page. Got another Origin."
    given = path.split("/")[1] if path.count("/") >= 2 else ""
    if not secrets.compare_digest(given.encode(), server.token.encode()):
        return "Expected the address with its token, as it was printed when the explorer started. Got another."
    return ""


def _answered(handle: Callable[[str, Mapping[str, Any]], dict[str, Any]], verb: str, body: bytes) -> tuple[int, dict[str, Any]]:
    """Return status and answer of one verb."""
    try:
        return 200, handle(verb, wire.parse(body))
    except KeyError as error:
        if error.args != (verb,):
            raise
        return 404, {"error": f"Expected a verb of the explorer. Got {verb!r}."}
    except (ValueError, TypeError) as error:
        return 400, {"error": str(error)}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return 500, {"error": f"The explorer failed: {type(error).__name__}: {error}"}


def _static() -> dict[str, tuple[bytes, str]]:
    """Return the files of the page by name, with their types."""
    folder = resources.files("bnnp.explorer") / "static"
    return {f.name: (f.read_bytes(), TYPES[f.name.rpartition(".")[2]]) for f in folder.iterdir() if f.name.rpartition(".")[2] in TYPES}


def explore(
    run: Run,
    *,
    data: Collection | None = None,
    port: int = 0,
    open_browser: bool = True,
    samples: int = 64,
    announce: Callable[[str], Any] = print,
) -> None:
    """Serve one page on which data are clicked in and the posterior moves with them, until Ctrl-C.

    The page is for this machine only: its address has a random token, and it loads nothing from elsewhere.

    Arguments:
        run: a model and the names of its columns, such as `Run.open` and `Run.of` give.
        data: tasks that can be loaded.
        port: to listen on, on 127.0.0.1; 0 for any that is free.
        open_browser: open the page in the browser of this machine.
        samples: number of particles at the start.
        announce: is told the address, and the end.

    Raises:
        OSError: the port is in use.
        ImportError: starlette or uvicorn is missing.
        ValueError: tasks of another number of columns than the model's.
    """
    server = Server(Explorer(run, data, samples), port)
    announce(f"Explore at {server.url}")
    announce("Press Ctrl-C to stop.")
    if open_browser:
        webbrowser.open(server.url)
    try:
        server.run()
    except KeyboardInterrupt:
        pass
    announce("Stopped.")
