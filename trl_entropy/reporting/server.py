"""
The server of a page that follows runs: on 127.0.0.1 alone, with a random word in its address, and read-only.

    with serving([Path("runs/quickstart")]) as address:
        print(address)      # http://127.0.0.1:PORT/WORD/

It has three answers and no way from an address to a file: `` is the page, `new?version=N` what has changed since, and
`step?name=RUN-STEP` the completions of a step. Imports no torch.
"""

from __future__ import annotations

import gzip
import hmac
import logging
import re
import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from trl_entropy.reporting.following import Followed
from trl_entropy.reporting.page import render_live
from trl_entropy.reporting.page_data import as_text
from trl_entropy.runs.strict_json import Json

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
# What a browser names when it was sent here by this address, or by the end of a tunnel; any other name that leads here
# belongs to somebody whose page would read the run (DNS rebinding).
_NAMES = ("127.0.0.1", "localhost", "[::1]")
_STEP = re.compile(r"(\d{1,6})-(\d{1,12})(-[0-9a-f]{1,16})?")
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",  # the address has the word
    "X-Content-Type-Options": "nosniff",
}
_LEAST_PACKED = 2000  # bytes


class PageServer(ThreadingHTTPServer):
    """
    Serves the page of these runs at `address` until it is closed.

    Args:
        paths: run directories.
        port: where to listen; 0 takes any that is free.
        every: seconds between two questions of the page for what is new; more if the answers take long.

    Raises:
        ValueError: when a directory is not there.
        OSError: when the port is taken.
    """

    daemon_threads = True

    def __init__(self, paths: Sequence[Path], port: int = 0, every: float = 2.0) -> None:
        self.followed, self.word, self.every = Followed(paths), secrets.token_urlsafe(24), every
        super().__init__((HOST, port), _Handler)

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.word}/"


@contextmanager
def serving(paths: Sequence[Path], port: int = 0, every: float = 2.0) -> Iterator[str]:
    """Inside, the page is served by a thread of its own at the address that this gives; see [`PageServer`]."""
    with PageServer(paths, port, every) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.address
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    """One request. Everything but GET, the right word and one of three places is refused."""

    server: PageServer
    server_version, sys_version, timeout = "trl-entropy", "", 30

    def do_GET(self) -> None:
        host = self.headers.get("Host", "")
        if re.sub(r":\d+$", "", host).lower() not in _NAMES:
            return self._say(HTTPStatus.MISDIRECTED_REQUEST, "This server answers to 127.0.0.1 and localhost alone.")
        parts = urlsplit(self.path)
        word, _, place = parts.path.removeprefix("/").partition("/")
        if not hmac.compare_digest(word.encode(), self.server.word.encode()):
            return self._say(HTTPStatus.NOT_FOUND, "Use the whole address that the command has printed.")
        given = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            self._answer(place, given)
        except (BrokenPipeError, ConnectionResetError):  # the reader has left
            self.close_connection = True
        except Exception as error:  # a file that is being written, or is damaged: the reader asks again
            logger.debug("a request failed", exc_info=True)
            self._say(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}")

    def _answer(self, place: str, given: dict[str, str]) -> None:
        followed = self.server.followed
        if place == "":
            page = followed.since(0)
            assert page is not None  # version 0 is before any
            return self._send(render_live(followed.names, page | {"every": self.server.every}), "text/html")
        if place == "new" and given.get("version", "").isdecimal():
            news = followed.since(int(given["version"]))
            return self._send_json(news, HTTPStatus.NO_CONTENT)
        if place == "step" and (named := _STEP.fullmatch(given.get("name", ""))):
            return self._send_json(followed.step(int(named[1]), int(named[2])), HTTPStatus.NOT_FOUND)
        return self._say(HTTPStatus.NOT_FOUND, "There is nothing here.")

    def _send_json(self, value: Json | None, otherwise: HTTPStatus) -> None:
        if value is None:
            return self._say(otherwise, "")
        return self._send(as_text(value), "application/json")

    def _say(self, status: HTTPStatus, text: str) -> None:
        self._send(text, "text/plain", status)

    def _send(self, text: str, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        content, headers = text.encode(), dict(_HEADERS)
        if len(content) >= _LEAST_PACKED and "gzip" in self.headers.get("Accept-Encoding", ""):
            content, headers["Content-Encoding"] = gzip.compress(content, 1), "gzip"
        self.send_response(status)
        if status != HTTPStatus.NO_CONTENT:
            headers |= {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(content))}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if status != HTTPStatus.NO_CONTENT:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a line would show the word."""
