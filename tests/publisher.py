"""A publisher of one file on this machine, as well-behaved as a test wants it."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from m3oe_fast.data.catalogue import PublishedFile

HOLD_SECONDS = 30


@dataclass
class Publisher:
    """What the server does and what it was asked.

    Attributes:
        content: the file.
        ranges: whether it answers Range requests with a part.
        cuts: after how many bytes of the body the first answers end, one after the other; the later ones are whole.
        statuses: HTTP statuses of the first answers.
        hold_at: bytes of a body after which it waits for ``go_on``.
        headers: besides the usual ones, or in their place; None leaves one out.
        first: where a part begins, whatever was asked.
        asked: the Range header of each request, None where there was none.
        paths: of each request.
    """

    content: bytes
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    hold_at: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    first: int | None = None
    asked: list[str | None] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    go_on: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def __enter__(self) -> Publisher:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"publisher": self}))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def file(self, name: str = "log.zip", content: bytes | None = None, algorithm: str = "sha256") -> PublishedFile:
        """What the catalogue says of the file; by default the truth."""
        content = self.content if content is None else content
        digest = hashlib.new(algorithm, content).hexdigest()
        return PublishedFile(name, f"http://127.0.0.1:{self.port}/{name}", len(content), f"{algorithm}:{digest}")


class _Handler(BaseHTTPRequestHandler):
    publisher: Publisher

    def do_GET(self) -> None:
        publisher, asked = self.publisher, self.headers.get("Range")
        publisher.asked.append(asked)
        publisher.paths.append(self.path)
        if self.path.startswith("/moved/"):
            self._answer(302, {"Location": "/" + self.path.removeprefix("/moved/")})
            return
        if publisher.statuses:
            self._answer(publisher.statuses.pop(0), {})
            return
        content, total = publisher.content, len(publisher.content)
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked and publisher.ranges else 0
        if first >= total:
            self._answer(416, {"Content-Range": f"bytes */{total}"})
            return
        headers: dict[str, str | None] = {"Content-Type": "application/zip", "Content-Length": str(total - first)}
        if first:
            first = first if publisher.first is None else publisher.first
            headers["Content-Range"] = f"bytes {first}-{total - 1}/{total}"
            headers["Content-Length"] = str(total - first)
        self._answer(206 if first else 200, headers | publisher.headers)
        body = content[first:]
        if publisher.cuts:
            body = body[: publisher.cuts.pop(0)]
        if publisher.hold_at is not None:
            self.wfile.write(body[: publisher.hold_at])
            publisher.go_on.wait(HOLD_SECONDS)
            body = body[publisher.hold_at :]
        self.wfile.write(body)

    def _answer(self, status: int, headers: dict[str, str | None]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the other side was killed
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def log_message(self, *_: object) -> None:
        pass
