"""A report that follows its runs: served on this machine, made anew when a run has changed.

Only what a report consists of is served, and only for reading. Without `--host` the server listens
on the loopback interface, and answers to its names alone: a page of another site cannot reach it
under a name of its own (DNS rebinding).
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import json
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from gradflow import cache, claim
from gradflow.errors import GradflowError
from gradflow.interrupt import Interrupt
from gradflow.page import INDEX
from gradflow.store import run_directories

HOST, PORT = "127.0.0.1", 8000
LOOK = 2.0
"""Seconds between two looks at the runs."""
REST = 3.0
"""Of the time that a report took, until the next: runs under way have the machine for themselves
most of the time."""
AGAIN = 10.0
"""Seconds after a report that failed."""

_FILES = re.compile(r"(?:figures/|tables/)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_TYPES = {
    ".html": "text/html; charset=utf-8", ".svg": "image/svg+xml", ".png": "image/png",
    ".pdf": "application/pdf", ".csv": "text/csv; charset=utf-8",
}  # fmt: skip
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_POLICIES = {".html": _POLICY, ".pdf": "frame-ancestors 'none'"}  # else no browser shows a PDF
_STATIC = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
_WAITING = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="refresh" content="2">
<title>gradflow report</title>
</head>
<body><p>{}</p></body>
</html>
"""


class Live:
    """A report under a URL; a context manager that ends the server.

    Args:
        places: stores, or single runs, that the report is over.
        out: the report's directory.
        make: makes the report anew, and gives the path of its index.
        host, port: where to listen; port 0 is any that is free.

    Attributes:
        url: of the page.

    Raises:
        GradflowError: one cannot listen there.
    """

    def __init__(
        self,
        places: Sequence[str],
        out: str | Path,
        make: Callable[[], Path],
        *,
        host: str = HOST,
        port: int = PORT,
    ):
        self._places, self._make = places, make
        self._seen: object = None
        self._told = ""
        self._next = 0.0
        self._server = _listening(host, port, Path(out))
        shown = f"[{host}]" if ":" in host else host
        self.url = f"http://{shown}:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def look(self) -> bool:
        """Make the report, if a run has changed since the last one: whether it was made.

        What cannot be made is told once, a line, and tried again.
        """
        began = time.monotonic()
        if began < self._next:
            return False
        found = _state(self._places)
        if found == self._seen:
            return False
        try:
            page = self._make()
        except GradflowError as error:
            self._failed(" ".join(str(error).splitlines()))
        except Exception as error:  # one report is lost, and not the server
            self._failed(f"no report could be made ({type(error).__name__}: {error})")
        else:
            self._server.shown = _Shown.of(page)
            self._seen, self._told = found, ""
            self._next = time.monotonic() + REST * (time.monotonic() - began)
            return True
        return False

    def _failed(self, why: str) -> None:
        self._next = time.monotonic() + (AGAIN if self._server.shown else 0)
        self._server.waiting = f"Waiting for runs: {why}."
        if why != self._told:
            print(f"gradflow: {why}", file=sys.stderr, flush=True)
        self._told = why


def serve(
    places: Sequence[str], out: str | Path, make: Callable[[], Path], *, host: str, port: int
) -> int:
    """Serve the report until Ctrl-C, or a signal to end: the process's exit code."""
    interrupt = Interrupt()  # once: a second one would disturb the clearing up
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    with (
        contextlib.suppress(KeyboardInterrupt),
        Live(places, out, make, host=host, port=port) as live,
    ):
        print(f"{live.url} (Ctrl-C ends)", flush=True)
        while True:
            if live.look():
                print(f"{time.strftime('%H:%M:%S')}: report made", flush=True)
            time.sleep(LOOK)
    # An interrupt within some library's `exec`, caught or not, has CPython end itself by SIGINT
    # later, unless another one has ended well.
    exec("")
    return 0


def _state(places: Sequence[str]) -> list[Any]:
    """What tells whether any run has changed, come or gone."""
    found: list[Any] = []
    for place in map(Path, places):
        with contextlib.suppress(OSError):
            for run in run_directories(place):
                with contextlib.suppress(OSError):
                    at_work = any(run.glob("attempt-*")) and claim.alive(run)
                    found.append((cache.fingerprint(run).files, at_work))
    return found


# --- what is served -------------------------------------------------------------------------------


class _Shown:
    """The page that is there, as `/version` tells."""

    def __init__(self, version: str, made: str):
        self.version, self.made = version, made

    @classmethod
    def of(cls, page: Path) -> _Shown:
        digest = hashlib.sha256(page.read_bytes()).hexdigest()
        return cls(digest, datetime.now(UTC).isoformat(timespec="seconds"))


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], root: Path):
        self.root = root
        self.shown: _Shown | None = None
        self.waiting = "The report is being made."
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.open = not _is_loopback(address[0])
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without the look at the name server that http.server takes."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone away is no error."""


def _listening(host: str, port: int, root: Path) -> _Server:
    try:
        return _Server((host, port), root)
    except OverflowError:
        raise GradflowError(f"--port={port}: 0 to 65535, 0 is any that is free") from None
    except OSError as error:
        where = f"{host}:{port}"
        raise GradflowError(
            f"{where}: cannot listen there ({error.strerror}); --port 0 takes any port"
        ) from None


def _is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name.lower() == "localhost"


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version, sys_version = "gradflow", ""
    timeout = 30  # seconds that a request may take to be said

    def do_GET(self) -> None:
        self._answer(*self._found())

    do_HEAD = do_GET

    def _refuse(self) -> None:
        self._answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET and HEAD\n", ".txt")

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse

    def _found(self) -> tuple[HTTPStatus, bytes, str]:
        """Status, content and the suffix that tells its type."""
        if not self._is_ours(self.headers.get_all("Host") or []):
            return HTTPStatus.FORBIDDEN, b"not a name of this server\n", ".txt"
        try:
            asked = unquote(urlsplit(self.path).path, errors="strict").removeprefix("/")
        except ValueError:
            asked = "/"
        shown = self.server.shown
        if asked == "version":
            version = {"version": shown.version, "made": shown.made} if shown else {"version": ""}
            return HTTPStatus.OK, json.dumps(version).encode(), ".json"
        name = asked or INDEX
        if name == INDEX and shown is None:
            page = _WAITING.format(escape(self.server.waiting))
            return HTTPStatus.OK, page.encode(), ".html"
        content = self._read(name)
        if content is None:
            return HTTPStatus.NOT_FOUND, b"not part of this report\n", ".txt"
        return HTTPStatus.OK, content, Path(name).suffix

    def _is_ours(self, hosts: list[str]) -> bool:
        if self.server.open:
            return True
        return len(hosts) == 1 and _is_loopback(re.sub(r":\d+$", "", hosts[0].strip()))

    def _read(self, name: str) -> bytes | None:
        """A file of the report; None for everything else, whatever links to it."""
        if not _FILES.fullmatch(name) or Path(name).suffix not in _TYPES:
            return None
        try:
            root = self.server.root.resolve()
            path = (root / name).resolve(strict=True)
            return path.read_bytes() if path == root / name and path.is_file() else None
        except OSError:
            return None

    def _answer(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        plain = {".json": "application/json"}.get(kind, "text/plain; charset=utf-8")
        self.send_header("Content-Type", _TYPES.get(kind, plain))
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", _POLICIES.get(kind, _STATIC))
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the console tells of reports."""
