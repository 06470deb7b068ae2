"""An S3 server in memory that fails as it is told."""

import contextlib
import http.server
import threading
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape


class FaultyServer(http.server.ThreadingHTTPServer):
    """Keeps objects in memory and fails as told: ``faults`` holds one name for each request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), FaultyHandler)
        self.objects = {}
        self.faults = []
        self.requests = Counter()
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def _serve(self):
        self.server.requests[self.command] += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "hang":
            self.server.released.wait()
        elif fault == "reset":
            self.close_connection = True
        elif fault in ERRORS:
            self._error(ERRORS[fault], fault)
        else:
            self._answer(body, fault)

    do_GET = do_HEAD = do_PUT = do_POST = _serve

    def _answer(self, body, fault):
        parts = urlsplit(self.path)
        key = unquote(parts.path)
        if self.command == "PUT":
            self._put(key, body, fault)
        elif self.command == "POST":
            self._delete(body, fault)
        elif "list-type" in parts.query:
            self._list(parse_qs(parts.query)["prefix"][0])
        elif key not in self.server.objects:
            self._error(404, "NoSuchKey")
        else:
            content, metadata = self.server.objects[key]
            self._send(200, content, metadata, fault)

    def _put(self, key, body, fault):
        if self.headers.get("If-None-Match") and key in self.server.objects:
            self._error(412, "PreconditionFailed")
            return
        metadata = {n: v for n, v in self.headers.items() if n.lower().startswith("x-amz-meta-")}
        self.server.objects[key] = body, metadata
        if fault == "answer lost":
            self.close_connection = True
        else:
            self._send(200, b"")

    def _delete(self, body, fault):
        names = [e.text for e in ElementTree.fromstring(body).iter() if e.tag.endswith("Key")]
        errors = ""
        for i, name in enumerate(names):
            if fault and i % 2:
                errors += (
                    f"<Error><Key>{name}</Key><Code>{fault}</Code><Message>m</Message></Error>"
                )
            else:
                self.server.objects.pop(f"/bucket/{name}", None)
        self._send(200, f"<DeleteResult>{errors}</DeleteResult>".encode())

    def _list(self, prefix):
        names = sorted(key.removeprefix("/bucket/") for key in self.server.objects)
        contents = "".join(
            f"<Contents><Key>{escape(name)}</Key></Contents>"
            for name in names
            if name.startswith(prefix)
        )
        self._send(200, f"<ListBucketResult>{contents}</ListBucketResult>".encode())

    def _error(self, status, code):
        body = f"<Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
        self._send(status, b"" if self.command == "HEAD" else body)

    def _send(self, status, content, headers=None, fault=""):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            content, self.close_connection = content[: len(content) // 2], True
        elif fault == "damage":
            content = bytes([content[0] ^ 1]) + content[1:]
        self.wfile.write(content)


ERRORS = {
    "SlowDown": 503,
    "ServiceUnavailable": 503,
    "InternalError": 500,
    "RequestTimeout": 400,
    "ConditionalRequestConflict": 409,
    "TooManyRequests": 429,
    "NoSuchBucket": 404,
    "AccessDenied": 403,
    "RequestTimeTooSkewed": 403,
    "AuthorizationHeaderMalformed": 400,
    "InsufficientStorage": 507,
    "XMinioStorageFull": 507,
    "NotImplemented": 501,
    "MalformedXML": 400,
}


@contextlib.contextmanager
def faulty_s3():
    """A running FaultyServer with a bucket called ``bucket``."""
    server = FaultyServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
