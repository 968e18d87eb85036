"""A web server on this machine alone that misbehaves as it is told, and what was asked of it."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """A file and how it is served; what is a list counts for the first requests, one each."""

    content: bytes
    etag: str | None = '"1"'
    ranges: bool = True
    kind: str = "application/octet-stream"
    length: int | None = None  # announced instead of the true one; -1: none
    most: list[int] = field(default_factory=list)  # bytes of the body, then the connection is closed
    stall: bool = False  # ... or is left open, silent
    statuses: list[int] = field(default_factory=list)  # without a file
    redirect: str = ""
    then: Served | None = None  # takes its place after the first request
    shift: int = 0  # of the part that is sent, against the one that was asked for


class Server:
    """`files` by path; `asked` lists (path, headers) of every request."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.asked.append((self.path, dict(self.headers)))
                self.close_connection = True
                answer(self, outer)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that was killed
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()

    def put(self, path: str, content: bytes, **how: object) -> str:
        """Serve a file; its address."""
        self.files[path] = Served(content, **how)
        return self.address(path)

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.http.server_port}{path}"

    def ranges(self) -> list[str | None]:
        """What was asked for by Range, request by request."""
        return [headers.get("Range") for _, headers in self.asked]

    def close(self) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


def answer(handler: BaseHTTPRequestHandler, server: Server) -> None:
    """Answer one request."""
    path = handler.path
    served = server.files.get(path)
    status = 404 if served is None else served.statuses.pop(0) if served.statuses else 0
    if status or served.redirect:
        handler.send_response(status or 302)
        handler.send_header("Location", served.redirect if served else "")
        handler.send_header("Retry-After", "0")
        handler.send_header("Content-Length", "0")
        handler.end_headers()
        return
    if served.then:
        server.files[path] = served.then
    content, start = served.content, 0
    wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    condition = handler.headers.get("If-Range")
    if wanted and served.ranges and condition in (None, served.etag):
        start = int(wanted[1])
        if start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start += served.shift
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        handler.send_response(200)
    body = content[start:]
    if served.length != -1:
        handler.send_header("Content-Length", str(len(body) if served.length is None else served.length))
    if served.etag:
        handler.send_header("ETag", served.etag)
    handler.send_header("Content-Type", served.kind)
    handler.end_headers()
    handler.wfile.write(body[: served.most.pop(0)] if served.most else body)
    handler.wfile.flush()
    if served.stall:
        served.stall = False
        server.over.wait(30)
