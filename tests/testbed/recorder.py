"""A port of this machine that records what is sent to it, in front of a server or in the place of one."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

_EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Recorder:
    """A port, and the bytes that clients have sent to it."""

    address: str  # HOST:PORT
    received: bytearray = field(default_factory=bytearray)


@contextlib.contextmanager
def recorder(server: str | None = None) -> Iterator[Recorder]:
    """Record what is sent to a new port. server: HOST:PORT that gets it; None: every request gets an empty answer."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if server is None:
                while b"\r\n\r\n" not in (part := self.request.recv(1 << 16)) and part:
                    here.received.extend(part)
                here.received.extend(part)
                self.request.sendall(_EMPTY)
                return
            host, _, port = server.partition(":")
            with socket.create_connection((host, int(port))) as onward:
                answers = threading.Thread(target=_pass_on, args=(onward, self.request), daemon=True)
                answers.start()
                _pass_on(self.request, onward, here.received)
                answers.join()

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 128

    with Server(("127.0.0.1", 0), Handler) as listening:
        here = Recorder(f"127.0.0.1:{listening.server_address[1]}")
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield here
        listening.shutdown()


def _pass_on(source: socket.socket, target: socket.socket, copy: bytearray | None = None) -> None:
    with contextlib.suppress(OSError):
        while part := source.recv(1 << 16):
            if copy is not None:
                copy.extend(part)
            target.sendall(part)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
