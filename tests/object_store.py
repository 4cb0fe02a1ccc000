"""An S3 server (moto) on the loopback interface, behind a proxy that injects network faults."""

import http.client
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FAULTS = ("500", "slow", "drop", "cut", "lost")
"""500: an internal error. slow: a response after 0.3 s. drop: no response, and the request is not carried out. cut:
half of the response's body. lost: the request is carried out, but its response is not sent."""


class Server:
    """moto behind the proxy. `meet("500", "drop")` sets the faults of the next requests, first to last."""

    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        self.moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.moto.start()
        self.moto_address = self.moto.get_host_and_port()  # (host, port) of moto itself, without faults
        self.faults: deque[str] = deque()
        self.only = ""  # faults apply only to requests that contain this text in method and path
        self.unconditional = False  # ignore If-None-Match, as some servers do
        self.seen: list[str] = []  # the requests so far, as "GET /bucket/key"
        self._lock = threading.Lock()
        self._proxy = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"server_of": self}))
        self._proxy.daemon_threads = True
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._proxy.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a program reaches the server."""
        key = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.address, **key}

    def bucket(self, name: str) -> str:
        """Create a bucket and return its URL, s3://NAME."""
        url = f"http://{self.moto_address[0]}:{self.moto_address[1]}/{name}"
        with urllib.request.urlopen(urllib.request.Request(url, method="PUT")):
            return f"s3://{name}"

    def meet(self, *faults: str, only: str = "") -> None:
        """Set the faults of the next requests; `only` limits them to requests that contain this text."""
        self.faults, self.only = deque(faults), only

    def check_keys(self, after: float) -> None:
        """Make moto refuse unknown access keys after `after` further requests."""
        url = f"http://{self.moto_address[0]}:{self.moto_address[1]}/moto-api/reset-auth"
        headers = {"Content-Type": "application/octet-stream"}
        with urllib.request.urlopen(urllib.request.Request(url, str(after).encode(), headers, method="POST")):
            pass

    def next_fault(self, request: str) -> str:
        """Record a request, METHOD /bucket/key; return the fault that it gets, "" for none."""
        with self._lock:
            self.seen.append(request)
            return self.faults.popleft() if self.faults and self.only in request else ""

    def calm(self) -> None:
        """Remove all faults and the list of requests."""
        self.meet()
        self.unconditional, self.seen = False, []

    def stop(self) -> None:
        self._proxy.shutdown()
        self._proxy.server_close()
        self.moto.stop()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: Server

    def handle_request(self) -> None:
        """Respond as moto does, or with the next fault."""
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server_of.next_fault(f"{self.command} {self.path}")
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "500":
            self.respond(500, {}, b"<Error><Code>InternalError</Code><Message>We erred.</Message></Error>")
            return
        if fault == "slow":
            time.sleep(0.3)
        status, headers, data = self.forward(body)
        if fault == "lost":
            self.close_connection = True
            return
        self.respond(status, headers, data, len(data) // 2 if fault == "cut" else None)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Send this request to moto; returns (status, headers, body) of its response."""
        headers = dict(self.headers)
        if self.server_of.unconditional:
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        connection = http.client.HTTPConnection(*self.server_of.moto_address, timeout=30)
        try:
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def respond(self, status: int, headers: dict[str, str], data: bytes, length: int | None = None) -> None:
        """Send a response; of its body only `length` bytes, if that is given."""
        self.send_response_only(status)
        not_forwarded = ("connection", "transfer-encoding", "content-length")
        for name, value in headers.items():
            if name.lower() not in not_forwarded:
                self.send_header(name, value)
        size = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size)
        self.end_headers()
        self.wfile.write(data if length is None else data[:length])
        if length is not None:
            self.wfile.flush()
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        return


@contextmanager
def running_server() -> Iterator[Server]:
    """A server that is stopped at the end of the block."""
    server = Server()
    try:
        yield server
    finally:
        server.stop()
