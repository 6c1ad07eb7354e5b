"""A plain web server on loopback, without ranges, for the files of a folder; with TLS where it has a certificate."""

from __future__ import annotations

import contextlib
import functools
import http.server
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import trustme


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # of connections at once; one too many would wait for a second


@contextlib.contextmanager
def web_server(folder: Path, certificate: trustme.LeafCert | None = None) -> Iterator[str]:
    """Yields its address."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with _Server(("127.0.0.1", 0), handler) as running:
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http{'' if certificate is None else 's'}://127.0.0.1:{running.server_port}"
        running.shutdown()
