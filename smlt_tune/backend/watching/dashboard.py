"""A fleet as a web page that updates itself, and as JSON, served from this process.

| path | what |
|---|---|
| ``/`` | the page; a small script replaces what it shows when that has changed |
| ``/view`` | what the page shows |
| ``/jobs/ID`` | one job: its reports, its allocations and why |
| ``/api/fleet`` | the snapshot as JSON, see :mod:`smlt_tune.backend.watching.snapshot` |

Whoever reads a fleet's journal sees the names and messages in it, so the server listens on this
machine only, unless it is given a token that every reader has to bring: in the address the first
time (it moves into a cookie then), or as ``Authorization: Bearer``. It reads, and changes nothing.
"""

import hashlib
import hmac
import ipaddress
import json
import logging
import re
import socket
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar, Self
from urllib.parse import parse_qs, unquote, urlsplit

from smlt_tune.backend import explain_text
from smlt_tune.backend.explain import Explanation
from smlt_tune.backend.watching import page
from smlt_tune.backend.watching.metrics import Metric
from smlt_tune.backend.watching.reading import Watch
from smlt_tune.backend.watching.snapshot import Snapshot
from smlt_tune.errors import InvalidInput, SmltError

_LOG = logging.getLogger(__name__)

#: A connection that says nothing for so long is closed, in seconds.
_IDLE_S = 30.0

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_SCRIPT = """\
"use strict";
const view = document.getElementById("view"), note = document.getElementById("note");
let tag = "";
async function update() {
  try {
    const answer = await fetch("/view", {headers: tag ? {"If-None-Match": tag} : {}});
    if (answer.status === 200) {
      view.innerHTML = await answer.text();
      tag = answer.headers.get("ETag");
    }
    note.textContent = answer.ok || answer.status === 304 ? "" : "stale: " + await answer.text();
  } catch (error) {
    note.textContent = "stale: the dashboard does not answer";
  }
  setTimeout(update, 2000);
}
update();
"""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{16,}")
_HTML, _TEXT = "text/html", "text/plain"


class Dashboard:
    """Serves one fleet. Use it as a context manager.

    Args:
        watch: The fleet.
        metric: Which metric jobs are compared by.
        host: Address to listen on.
        port: 0 chooses a free one.
        token: Whoever reads has to bring it; None only on addresses of this machine alone.

    Raises:
        InvalidInput: The address is open to others and there is no token, or cannot be used.
    """

    def __init__(
        self,
        watch: Watch,
        metric: Callable[[Snapshot], Metric],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
    ) -> None:
        if token is None and not is_loopback(host):
            raise InvalidInput(f"host={host!r} can be reached by others: it needs a token")
        if token is not None and not _TOKEN.fullmatch(token):
            raise InvalidInput("a token needs at least 16 letters, digits, '-' and '_'")
        site = _Site(watch, metric, token, is_loopback(host))
        try:
            self._server = _Server(host, port, partial(_Handler, site))
        except (OSError, OverflowError) as error:
            raise InvalidInput(f"cannot listen on {host}:{port}: {error}") from error
        self.host = host
        self.port = site.port = int(self._server.server_address[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def serve(self) -> None:
        """Answers until :meth:`stop`, or an exception of a signal's handler."""
        self._server.serve_forever(poll_interval=0.2)

    def stop(self) -> None:
        """Ends :meth:`serve`, which has to run in another thread."""
        self._server.shutdown()


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Site:
    """What there is to see.

    Args:
        watch: The fleet.
        metric: Which metric jobs are compared by.
        token: What readers have to bring.
        local: Only this machine can reach it; then a page of another site might still try to, under
            a name of its own that leads here.
    """

    def __init__(
        self, watch: Watch, metric: Callable[[Snapshot], Metric], token: str | None, local: bool
    ) -> None:
        self._watch, self._metric = watch, metric
        self.token, self.local, self.port = token, local, 0

    def answer(self, path: str) -> tuple[str, str] | None:
        """Type and content of a page; None if there is no such page.

        Raises:
            SmltError: The journal cannot be read.
        """
        if path in self._fixed:
            return self._fixed[path]
        shot = self._watch.snapshot()
        if path == "/view":
            return _HTML, page.fleet(shot, self._metric(shot), links=True)
        if path == "/api/fleet":
            return "application/json", json.dumps(shot.to_json(), allow_nan=False)
        for job in shot.jobs:
            if path == f"/jobs/{job.job_id}":
                return _HTML, self._job(shot, job.job_id)
        return None

    _fixed: ClassVar = {
        "/": (
            _HTML,
            page.document(
                "Fleet",
                '<link rel="stylesheet" href="/style.css">',
                '<p id="note" class="quiet"></p><main id="view"></main>'
                '<script src="/live.js"></script>',
            ),
        ),
        "/style.css": ("text/css", page.STYLE),
        "/live.js": ("text/javascript", _SCRIPT),
    }

    def _job(self, shot: Snapshot, job_id: str) -> str:
        view = next(one for one in shot.jobs if one.job_id == job_id)
        explained = Explanation(
            view.job_id, view.status, view.reason, view.steps, view.time_s, view.cost_usd
        )
        body = page.job(view, self._metric(shot), explain_text.told(explained))
        head = '<link rel="stylesheet" href="/style.css">'
        return page.document(job_id, head, f'<p><a href="/">the fleet</a></p>{body}')


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "smlt", ""
    timeout: ClassVar[float | None] = _IDLE_S

    def __init__(self, site: _Site, *arguments: Any) -> None:
        self._site = site
        super().__init__(*arguments)

    def do_GET(self) -> None:
        """Answers a request."""
        asked = urlsplit(self.path)
        given = parse_qs(asked.query).get("token", [""])[0]
        if self._site.local and not self._asks_for_this_machine():
            self._send(HTTPStatus.MISDIRECTED_REQUEST, _TEXT, "ask for 127.0.0.1 or localhost\n")
        elif self._site.token and _same(given, self._site.token):
            cookie = f"{self._cookie}={given}; HttpOnly; SameSite=Strict; Path=/"
            self._send(
                HTTPStatus.SEE_OTHER,
                _TEXT,
                "",
                {"Location": "/", "Set-Cookie": cookie},
            )
        elif self._site.token and not self._has_token(self._site.token):
            self._send(
                HTTPStatus.UNAUTHORIZED, _TEXT,
                "open the address that smlt dashboard has printed, with its token\n",
                {"WWW-Authenticate": "Bearer"},
            )  # fmt: skip
        else:
            self._show(unquote(asked.path))

    do_HEAD = do_GET

    def log_message(self, format: str, *arguments: object) -> None:
        """Addresses may hold the token: nothing is logged."""

    def _show(self, path: str) -> None:
        try:
            found = self._site.answer(path)
        except SmltError as error:
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, _TEXT, f"{error}\n")
            return
        if found is None:
            self._send(HTTPStatus.NOT_FOUND, _TEXT, "there is no such page\n")
            return
        kind, content = found
        tag = f'"{hashlib.sha256(content.encode()).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == tag:
            self._send(HTTPStatus.NOT_MODIFIED, kind, "", {"ETag": tag})
        else:
            self._send(HTTPStatus.OK, kind, content, {"ETag": tag})

    def _send(
        self, status: HTTPStatus, kind: str, content: str, more: dict[str, str] | None = None
    ) -> None:
        body = content.encode(errors="replace")
        self.send_response(status)
        for name, value in {**_HEADERS, **(more or {})}.items():
            self.send_header(name, value)
        if status != HTTPStatus.NOT_MODIFIED:
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _asks_for_this_machine(self) -> bool:
        """Browsers tell the name that was asked for: one of another site was made to lead here."""
        try:
            return is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or "")
        except ValueError:
            return False

    def _has_token(self, token: str) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and _same(given.strip(), token):
            return True
        try:
            cookies = SimpleCookie(self.headers.get("Cookie", ""))
        except CookieError:
            return False
        return self._cookie in cookies and _same(cookies[self._cookie].value, token)

    @property
    def _cookie(self) -> str:
        """Cookies do not tell ports apart."""
        return f"smlt-{self._site.port}"


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, host: str, port: int, handler: Callable[..., _Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is nothing to report."""
        _LOG.debug("a request of the dashboard failed", exc_info=True)


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())
