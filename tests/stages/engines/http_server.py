"""A real HTTP server with SGLang's endpoints that answers as a test asks: late, with an error, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Reply = Callable[[dict[str, Any]], dict[str, Any] | str | None]  # payload -> body; None: the connection is closed


class Refusal(Exception):
    """Makes the server answer with this status."""

    def __init__(self, status: int, text: str = "told to", **headers: str) -> None:
        super().__init__(text)
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


@dataclass
class HttpServer:
    """A server: `replies` maps a path to its function, `asked` lists every (path, payload) in order."""

    replies: dict[str, Reply]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # headers Authorization of all requests that had one
    at_once: int = 0
    most_at_once: int = 0
    url: str = ""
    api_key: str = ""  # required of all requests except those for /health and /metrics, as by both engines
    lock: threading.Lock = field(default_factory=threading.Lock)
    _http: ThreadingHTTPServer | None = None

    def count(self, path: str) -> int:
        with self.lock:
            return sum(asked == path for asked, _ in self.asked)

    def start(self) -> None:
        """On a free port; after `stop` on the same one."""
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _answer(self, payload: dict[str, Any]) -> None:
                with server.lock:
                    server.asked.append((self.path, payload))
                    server.keys += filter(None, [self.headers.get("Authorization")])
                    server.at_once += 1
                    server.most_at_once = max(server.most_at_once, server.at_once)
                headers: dict[str, str] = {}
                shown = self.headers.get("Authorization") == f"Bearer {server.api_key}"
                try:
                    if server.api_key and not shown and self.path not in ("/health", "/metrics"):
                        raise Refusal(401)
                    status, body = 200, server.replies[self.path](payload) if self.path in server.replies else {}
                    if self.path not in server.replies:
                        status = 404
                except Refusal as refusal:
                    status, body, headers = refusal.status, {"error": {"message": str(refusal)}}, refusal.headers
                finally:
                    with server.lock:
                        server.at_once -= 1
                if body is None:
                    self.close_connection = True
                    return
                data = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b"{}"))

            def log_message(self, *_: object) -> None:
                pass

            def handle(self) -> None:
                with suppress(ConnectionError, TimeoutError):  # a client that gave up: often what the test is about
                    super().handle()

        class Http(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 64

        self._http = Http(("127.0.0.1", urlsplit(self.url).port or 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def running(self) -> bool:
        return self._http is not None

    def stop(self) -> None:
        """No new connections from now on: to a client this is a dead machine."""
        http, self._http = self._http, None
        if http is not None:
            http.shutdown()
            http.server_close()


@contextmanager
def serving(generate: Reply, **replies: Reply) -> Iterator[HttpServer]:
    """Run a server whose /generate is `generate`; further endpoints by name."""
    server = HttpServer({"/generate": generate, **{f"/{name}": reply for name, reply in replies.items()}})
    server.start()
    try:
        yield server
    finally:
        server.stop()


def answer(payload: dict[str, Any], *, delay_s: float = 0.0, **meta: Any) -> dict[str, Any]:
    """Return a good answer, which counts on from the prompt's last token."""
    time.sleep(delay_s)
    count = payload["sampling_params"]["max_new_tokens"]
    start = payload["input_ids"][-1] + 1
    return {
        "output_ids": list(range(start, start + count)),
        "meta_info": {
            "finish_reason": {"type": "length", "length": count},
            "prompt_tokens": len(payload["input_ids"]),
            **meta,
        },
    }


def is_probe(payload: dict[str, Any]) -> bool:
    """Return whether this is the client's health check."""
    return "rid" not in payload
