"""A real S3 server on loopback, and a proxy before any server that refuses, holds back or cuts short."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import pytest
import s3fs
from moto.server import ThreadedMotoServer

SECRET = "not-to-be-seen-0123456789"
# "cut" ends the body in the middle as if it were whole, "reset" with a reset, "freeze" sends no more of it.
Fault = Literal["500", "503", "403", "stall", "reset", "cut", "freeze"]
_CODES = {"500": "InternalError", "503": "SlowDown", "403": "AccessDenied"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a fault may depend on. number: how many requests for this method and path came before."""

    method: str
    path: str
    number: int


@contextlib.contextmanager
def server() -> Iterator[str]:
    """An S3 server without any bucket; yields its address."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        # What it holds is the whole process's: the next server would begin with these buckets.
        connection = http.client.HTTPConnection(host, port)
        connection.request("POST", "/moto-api/reset")
        connection.getresponse().read()
        connection.close()
        running.stop()


def environment(endpoint: str) -> dict[str, str]:
    """What a user sets to reach a server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "3",
    }


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let this process's s3:// be the server at this address."""
    for name, value in environment(endpoint).items():
        monkeypatch.setenv(name, value)
    # Clients are kept between uses, with the address they were made for.
    s3fs.S3FileSystem.clear_instance_cache()


def objects(endpoint: str, bucket: str) -> dict[str, bytes]:
    """Name -> content of everything in a bucket."""
    store = s3fs.S3FileSystem(endpoint_url=endpoint, key="somebody", secret=SECRET, use_listings_cache=False)
    return {name.removeprefix(f"{bucket}/"): store.cat_file(name) for name in store.find(bucket)}


@contextlib.contextmanager
def proxy(target: str, fault: Callable[[Request], Fault | None]) -> Iterator[str]:
    """Passes requests on to the target but for those that ``fault`` names; yields its own address."""
    address = target.removeprefix("http://")
    seen: dict[tuple[str, str], int] = {}
    released = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            key = (self.command, self.path)
            seen[key] = seen.get(key, -1) + 1
            match fault(Request(method=self.command, path=self.path, number=seen[key])):
                case "stall":
                    released.wait()
                    self.close_connection = True
                case "500" | "503" | "403" as status:
                    code = _CODES[status]
                    content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                    self.answer(int(status), {"Content-Type": "application/xml"}, content)
                case "reset" | "cut" | "freeze" | None as fault_within:
                    upstream = http.client.HTTPConnection(address)
                    upstream.request(self.command, self.path, body, dict(self.headers))
                    response = upstream.getresponse()
                    self.answer(response.status, dict(response.getheaders()), response.read(), fault_within)
                    upstream.close()

        def answer(
            self, status: int, headers: dict[str, str], content: bytes, fault_within: Fault | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                    self.send_header(name, value)
            length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content if fault_within is None else content[: len(content) // 2])
            if fault_within is None:
                return
            self.wfile.flush()
            if fault_within == "freeze":
                released.wait()
            if fault_within == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                # Not the server's own way to close, which would say goodbye first.
                os.close(self.connection.detach())
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        request_queue_size = 64  # of connections at once; one too many would wait for a second

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{running.server_port}"
        finally:
            released.set()
            running.shutdown()
