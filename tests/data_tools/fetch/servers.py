"""Servers that behave like PMC's bucket and Semantic Scholar's, on this machine, with faults on demand."""

import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


@dataclass
class Answer:
    """What a server sends; `cut` ends the connection after so many bytes of the body."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing of clients that close their connections, as killed ones do."""


class Server:
    """Answers GET requests, and counts the bytes of the bodies it served by path.

    Args:
        answer: (path with query, headers in lower case) to an answer.
    """

    def __init__(self, answer: Callable[[str, dict[str, str]], Answer]) -> None:
        self.answer = answer
        self.bodies: Counter[str] = Counter()
        self.counting = threading.Lock()
        self.requests: list[tuple[str, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes

            def do_GET(self) -> None:
                headers = {key.lower(): value for key, value in self.headers.items()}
                server.requests.append((self.path, headers))
                answer = server.answer(self.path, headers)
                body = answer.body if answer.cut is None else answer.body[: answer.cut]
                with server.counting:
                    server.bodies[self.path.partition("?")[0]] += len(body)
                self.send_response(answer.status)
                for key, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                    self.send_header(key, value)
                self.end_headers()
                try:
                    self.wfile.write(body)
                except OSError:  # the client had seen enough
                    self.close_connection = True
                if answer.cut is not None:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        self._http = _Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def paths(self) -> list[str]:
        return [path.partition("?")[0] for path, _ in self.requests]

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()


def forward(url: str) -> Answer:
    """The answer of another server."""
    try:
        with urllib.request.urlopen(url) as response:  # noqa: S310
            return Answer(response.status, response.read(), _headers(dict(response.headers)))
    except urllib.error.HTTPError as error:
        return Answer(error.code, error.read(), _headers(dict(error.headers)))


def _headers(headers: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in headers.items() if key.lower() in ("etag", "content-type")}


class SemanticScholar:
    """The Datasets API and the store that its pre-signed links lead to.

    Attributes:
        files: name to bytes, of the one dataset.
        faults: answers sent instead, a list by path, the first one first; None leaves one request alone.
        signature: what links are signed with now; older links are refused.
        ranges: does the store honour Range.
        etags: name to ETag, where it is not the MD5.
    """

    def __init__(self, files: dict[str, bytes], key: str = "the-key", latest: str = "2026-09-17") -> None:
        self.files, self.key, self.latest = files, key, latest
        self.faults: dict[str, list[Answer | None]] = {}
        self.signature = 1
        self.ranges = True
        self.etags: dict[str, str] = {}
        self.on_file: Callable[[str, int], Answer | None] = lambda name, begin: None
        self.server = Server(self._answer)

    def _answer(self, path: str, headers: dict[str, str]) -> Answer:
        short = path.partition("?")[0]
        if waiting := self.faults.get(short):
            fault = waiting.pop(0)
            if fault:
                return fault
        if short.startswith("/datasets/v1/release/"):
            return self._api(short.removeprefix("/datasets/v1/release/"), headers)
        return self._file(path, headers)

    def _api(self, path: str, headers: dict[str, str]) -> Answer:
        if path == "latest":
            return _json(200, {"release_id": self.latest, "datasets": []})
        if headers.get("x-api-key") != self.key:
            return _json(401, {"error": "A valid API key is required"})
        match = re.fullmatch(r"([^/]+)/dataset/s2orc(_v2)?", path)
        if not match:
            return _json(404, {"error": "not found"})
        urls = [f"{self.server.url}/staging/{match[1]}/{name}?X-Amz={self.signature}" for name in self.files]
        return _json(200, {"name": "s2orc", "README": "ODC-BY", "files": urls})

    def _file(self, path: str, headers: dict[str, str]) -> Answer:
        url = urlsplit(path)
        if int(parse_qs(url.query)["X-Amz"][0]) < self.signature:
            return Answer(403, b"<Error><Code>AccessDenied</Code></Error>")
        name = url.path.rpartition("/")[2]
        whole = self.files[name]
        etag = self.etags.get(name, f'"{hashlib.md5(whole, usedforsecurity=False).hexdigest()}"')
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", ""))
        if not self.ranges or not span or headers.get("if-range", etag) != etag:
            return self._maybe(name, 0, Answer(200, whole, {"ETag": etag}))
        begin, end = int(span[1]), int(span[2] or len(whole) - 1)
        answer = Answer(206, whole[begin : end + 1], {"ETag": etag})
        answer.headers["Content-Range"] = f"bytes {begin}-{end}/{len(whole)}"
        return answer if span[2] else self._maybe(name, begin, answer)

    def _maybe(self, name: str, begin: int, answer: Answer) -> Answer:
        """What the test wants for a request of a body, in place of the answer or with a cut."""
        return self.on_file(name, begin) or answer


def _json(status: int, value: object) -> Answer:
    return Answer(status, json.dumps(value).encode())
