"""A proxy in front of a real SGLang server that spoils what passes: late, half, wrong, or not at all."""

from __future__ import annotations

import functools
import re
import socket
import threading
import time
from contextlib import ExitStack, suppress
from enum import Enum
from pathlib import Path
from urllib.parse import urlsplit

from tests.sglang_cpu.server import running_server, sglang_python
from tests.testbed import target

_CHUNK = 1 << 16
_SLOW_S = 2.0  # before each piece of an answer
_IDS = re.compile(rb'"output_ids":\s*\[[0-9, ]*\]')


class Mood(Enum):
    """What the proxy does to answers of /generate; SILENT and GONE concern all requests."""

    WELL = "well"
    SLOW = "slow"
    HALF = "half"  # its second half is missing, and the connection closed
    GARBAGE = "garbage"  # no JSON
    WRONG = "wrong"  # token ids that the model does not have
    SILENT = "silent"  # nothing comes
    GONE = "gone"  # no connection


class Proxy:
    """Passes bytes between clients and the server at `upstream`, a host and port; `mood` may be changed at any time."""

    def __init__(self, upstream: tuple[str, int]) -> None:
        self.mood = Mood.WELL
        self.spoiled = 0
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if self.mood is Mood.GONE:
                self.spoiled += 1
                client.close()
                continue
            with suppress(OSError):
                server = socket.create_connection(self._upstream)
                asks = _Connection(self, client, server)
                for pump in (asks.requests, asks.answers):
                    threading.Thread(target=pump, daemon=True).start()


class _Connection:
    """One client's connection, and its counterpart to the server."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._generates = False

    def requests(self) -> None:
        with suppress(OSError):
            while piece := self._client.recv(_CHUNK):
                if b" HTTP/1.1\r\n" in piece:
                    self._generates = piece.startswith(b"POST /generate ")
                self._server.sendall(piece)
        self._close()

    def answers(self) -> None:
        with suppress(OSError):
            while piece := self._server.recv(_CHUNK):
                mood = self._proxy.mood
                if mood is Mood.WELL or not (self._generates or mood in (Mood.GONE, Mood.SILENT)):
                    self._client.sendall(piece)
                    continue
                self._proxy.spoiled += 1
                if not self._spoil(mood, piece):
                    break
        self._close()

    def _spoil(self, mood: Mood, piece: bytes) -> bool:
        """Pass on the spoiled piece. Return whether the connection stays open."""
        head, gap, body = piece.partition(b"\r\n\r\n") if piece.startswith(b"HTTP/") else (b"", b"", piece)
        match mood:
            case Mood.SLOW:
                time.sleep(_SLOW_S)
                self._client.sendall(piece)
            case Mood.HALF:
                self._client.sendall(head + gap + body[: len(body) // 2])
                return not body  # the body comes in its own piece
            case Mood.GARBAGE:
                self._client.sendall(head + gap + b"\xff" * len(body))
            case Mood.WRONG:
                self._client.sendall(_IDS.sub(lambda ids: re.sub(rb"\d", b"9", ids[0]), piece))
            case Mood.SILENT:
                while self._proxy.mood is Mood.SILENT:
                    time.sleep(0.05)
                return False
            case Mood.GONE:
                return False
        return True

    def _close(self) -> None:
        for end in (self._client, self._server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


SERVERS = ExitStack()  # closed when the series ends


@functools.cache
def proxy(folder: Path) -> Proxy:
    """Return the proxy in front of the one server of the series, on the CPU. folder: for the server's log."""
    python = sglang_python()
    if isinstance(python, str):
        raise SystemExit(python)
    url = SERVERS.enter_context(running_server(python, target.target_folder(), log=folder / "sglang.log"))
    address = urlsplit(url)
    return Proxy((str(address.hostname), int(address.port or 0)))
