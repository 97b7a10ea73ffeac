"""Distributes requests over servers, limits those in flight, and sends lost ones again, elsewhere if possible."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.retry import backoff_s, retry_on
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.config import ServerEngineConfig
from draftsmith.stages.engines.servers.api import BadAnswerError, ServerApi
from draftsmith.stages.engines.servers.http import (
    Json,
    RequestLostError,
    ServerAnswer,
    ServerFullError,
    ServerStalledError,
)
from draftsmith.stages.engines.servers.process import ServerProcess

_MAX_DEATHS = 2  # give up a request after this many servers die holding it
_PROBE_AFTER_S = 60.0  # without an answer from a server with requests: check its health
_FAILING_LIMIT_S = 60.0  # of failing health checks: the server is lost
# of a server that is up but computes nothing: it may compile; SGLang's watchdog ends it after 300 s
_STALLED_LIMIT_S = 600.0
_FULL_LIMIT_S = 3600.0  # without any answer of a full server: give up its requests
_FULL_PAUSE_S, _MAX_FULL_PAUSE_S = 1.0, 600.0  # until a full server is tried again


class LostTooOftenError(RetryableError):
    """A request was lost each time, on servers that are alive."""


class TimedOutError(DraftsmithError):
    """A request was not finished in time by a server that computes."""


class PoisonRequestError(DraftsmithError):
    """Servers died while they had this request, so it is not sent again."""


_TRIES: dict[type[Exception], int] = {RequestLostError: 6, BadAnswerError: 3, TimedOutError: 2}


class DeathLog:
    """The servers that died, by request in flight; a file, since the stage is retried when no server is left."""

    def __init__(self, path: Path):
        self._path = path
        self._servers: dict[str, list[str]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def servers(self, request: str) -> list[str]:
        """Return the addresses of the servers that died while they had this request."""
        return self._servers.get(request, [])

    def record(self, requests: Collection[str], url: str) -> None:
        for request in requests:
            self._servers.setdefault(request, []).append(url)
        self._write()

    def forget(self, requests: Collection[str]) -> None:
        if recorded := self._servers.keys() & set(requests):
            for request in recorded:
                del self._servers[request]
            self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._servers, indent=2))


@dataclass(eq=False)
class Server:
    """A server as the client sees it, created inside the event loop. Times are of the monotonic clock."""

    url: str
    replicas: int = 1  # replicas of the model, which share its requests
    workers: tuple[str, ...] = ()  # the servers that a router routes to
    process: ServerProcess | None = None  # started here
    requests: set[str] = field(default_factory=set)  # in flight
    lost: str | None = None  # why it gets no more requests
    lost_event: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    health_check: asyncio.Task[None] | None = None  # meanwhile it gets no new requests
    answered_at: float = field(default_factory=time.monotonic)
    was_full: bool = False

    def ended(self) -> str | None:
        """Return how its process ended; None: it runs, or was not started here."""
        if self.process is None or not (how := self.process.ended()):
            return None
        return f"{how} (log: {self.process.log_path})"


@dataclass(eq=False)
class PendingRequest:
    """A request without an answer yet."""

    name: str
    payload: Json
    read: Callable[[ServerAnswer], Completion]
    avoid: Server | None = None  # its last failure was here: used only if no other server is left
    failures: int = 0  # attempts that count; refusals of a full server do not

    def give_up(self, error: BaseException) -> bool:
        """Count a failure. Returns whether to give up the request."""
        if isinstance(error, ServerFullError):
            assert self.avoid is not None
            return time.monotonic() - self.avoid.answered_at > _FULL_LIMIT_S
        self.failures += 1
        return self.failures >= next(tries for kind, tries in _TRIES.items() if isinstance(error, kind))


class ServerPool:
    """Distributes requests over servers; to be used inside one event loop.

    config: limits the requests in flight per replica, and the time per request. stream: measure the first token's time.
    """

    def __init__(
        self,
        api: ServerApi,
        client: httpx.AsyncClient,
        servers: list[Server],
        config: ServerEngineConfig,
        deaths: DeathLog,
        log: Callable[[str], None],
        *,
        stream: bool = False,
    ):
        self.servers, self._deaths = servers, deaths
        self.retries = 0  # repeated attempts
        self._api, self._client, self._stream = api, client, stream
        self._timeout_s = config.request_timeout_s
        self._concurrency, self._log = config.concurrency, log
        self._total: int | None = None
        self._changed = asyncio.Event()
        self._reported: set[ServerProcess] = set()

    @property
    def capacity(self) -> int:
        """Return the number of requests that may be in flight while no server is lost."""
        return self._total or sum(self._concurrency * server.replicas for server in self.servers)

    async def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: back to the bound of every server."""
        self._total = total
        self._wake()

    async def forget_deaths(self, requests: Collection[str]) -> None:
        """Allow these requests to be sent again although servers died with them."""
        self._deaths.forget(requests)

    async def send(self, name: str, payload: Json, read: Callable[[ServerAnswer], Completion]) -> Completion:
        """Send to the least loaded server, and again, elsewhere if possible, until `read` accepts the answer.

        Raises RefusedRequestError if a server refuses the request, TimedOutError, BadAnswerError or LostTooOftenError
        after the last attempt, PoisonRequestError if servers died with it, RetryableError if no server is left.
        """
        request = PendingRequest(name, payload, read)
        retry = retry_on(
            tuple(_TRIES),
            give_up=lambda error, _attempts, _seconds: request.give_up(error),
            pause_s=_pause_s,
            on_retry=lambda error, _attempts: self._note_retry(request, error),
        )
        try:
            return await retry(self._attempt)(request)
        except RequestLostError as error:
            raise LostTooOftenError(
                f"request {name}: was lost each time, the last time: {error}. Look at the server's log."
            ) from error

    def _note_retry(self, request: PendingRequest, error: BaseException) -> None:
        assert request.avoid is not None
        if isinstance(error, ServerFullError):
            if not request.avoid.was_full:
                request.avoid.was_full = True
                self._log(
                    f"{self._api.title} server {request.avoid.url} is full: it {error}. Requests wait; lower "
                    "engine.concurrency."
                )
            return
        self.retries += 1
        if isinstance(error, BadAnswerError):
            self._log(f"sent again: {error} ({request.avoid.url})")

    async def _attempt(self, request: PendingRequest) -> Completion:
        server = await self._reserve(request)
        try:
            return request.read(await self._post(server, request))
        except (RequestLostError, BadAnswerError, TimedOutError):
            request.avoid = server
            raise
        finally:
            server.requests.discard(request.name)
            self._wake()

    async def _reserve(self, request: PendingRequest) -> Server:
        """Wait for a server with room."""
        while True:
            if len(died := self._deaths.servers(request.name)) >= _MAX_DEATHS:
                raise PoisonRequestError(
                    f"request {request.name}: was in flight when {len(died)} servers died ({', '.join(died)}), and is "
                    "not sent again. Look at the ends of their logs."
                )
            alive = [server for server in self.servers if server.lost is None]
            if not alive:
                reasons = "; ".join(f"{server.url} {server.lost}" for server in self.servers)
                raise RetryableError(
                    f"request {request.name}: no {self._api.title} server is left: {reasons}. Start those of "
                    "engine.urls again and run the same command, finished answers are kept."
                )
            candidates = [server for server in alive if server is not request.avoid] or alive
            if free := [server for server in candidates if self._has_room(server)]:
                server = min(free, key=lambda server: len(server.requests) / server.replicas)
                server.requests.add(request.name)
                return server
            await self._changed.wait()

    def _has_room(self, server: Server) -> bool:
        if server.health_check is not None:
            return False
        if self._total is not None:
            return sum(len(other.requests) for other in self.servers) < self._total
        return len(server.requests) < self._concurrency * server.replicas

    def _wake(self) -> None:
        """Let requests that wait for a server check again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _post(self, server: Server, request: PendingRequest) -> ServerAnswer:
        """Send a request once. Raises a loss once it is known whether the server still lives."""
        request_id = uuid.uuid4().hex
        payload = {**request.payload, self._api.id_field: request_id}
        generating = self._api.generate(self._client, server.url, request.name, payload, stream=self._stream)
        post = asyncio.create_task(generating)
        try:
            if not await self._wait_for_answer(server, post):
                await self._check_health(server)
                if server.lost is not None:
                    raise RequestLostError(server.lost)
                raise TimedOutError(
                    f"request {request.name}: {server.url} computes, but did not finish it in {self._timeout_s:g} s "
                    "(engine.request_timeout_s). Raise it, or lower engine.concurrency (requests wait for each other) "
                    "or sampling.max_new_tokens."
                )
            answer = post.result()
        except ServerFullError:
            raise
        except RequestLostError:
            if server.lost is None:
                await self._check_health(server)
            raise
        finally:
            if not post.done():
                post.cancel()
                await self._abort(server, request_id)
        server.answered_at = time.monotonic()
        self._deaths.forget([request.name])
        return answer

    async def _wait_for_answer(self, server: Server, post: asyncio.Task[ServerAnswer]) -> bool:
        """Wait for an answer; False after the config's time limit. Raises RequestLostError if the server is lost."""
        deadline = time.monotonic() + self._timeout_s
        either: set[asyncio.Future[Any]] = {post, server.lost_event}
        while not post.done():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            await asyncio.wait(either, timeout=min(left, _PROBE_AFTER_S), return_when=asyncio.FIRST_COMPLETED)
            if not post.done() and server.lost is not None:
                raise RequestLostError(server.lost)
            if not post.done() and time.monotonic() - server.answered_at > _PROBE_AFTER_S:
                self._check_health(server)  # a host that lost power breaks no connection
        return True

    async def _abort(self, server: Server, request_id: str) -> None:
        if server.lost is None:
            for url in server.workers or (server.url,):
                with suppress(Exception):
                    await self._api.abort(self._client, url, request_id)

    def _check_health(self, server: Server) -> Awaitable[None]:
        """Start one health check for all waiting requests of a server, or join the running one."""
        if server.health_check is None:
            server.health_check = asyncio.create_task(self._run_health_check(server))
        return asyncio.shield(server.health_check)

    async def _run_health_check(self, server: Server) -> None:
        """Check until the server answers, or mark it lost."""
        since = time.monotonic()

        async def check() -> None:
            if server.answered_at < since:
                await self._check_once(server)

        def give_up(error: BaseException, _attempts: int, seconds: float) -> bool:
            limit_s = _STALLED_LIMIT_S if isinstance(error, ServerStalledError) else _FAILING_LIMIT_S
            return server.ended() is not None or seconds > limit_s

        try:
            await retry_on(RequestLostError, give_up=give_up)(check)()
        except Exception as error:  # any kind: requests must not wait for ever
            self._deaths.record(server.requests, server.url)
            if server.lost is None:
                server.lost = server.ended() or str(error)
                self._log(f"{self._api.title} server {server.url} is lost: {server.lost}")
                server.lost_event.set_result(None)
        finally:
            process = server.process
            if process is not None and process not in self._reported and (how := process.ended()):
                self._reported.add(process)
                self._log(f"{process.url} {how}; the end of {process.log_path}:\n{process.tail()}")
            server.health_check = None
            self._wake()

    async def _check_once(self, server: Server) -> None:
        """Check that the server computes; for a router, that it answers and one of its workers computes."""
        urls = server.workers or (server.url,)
        results = await asyncio.gather(
            *(self._api.check_health(self._client, url) for url in urls), return_exceptions=True
        )
        errors = [error for error in results if error is not None]
        if len(errors) == len(urls):
            raise errors[0]
        if server.workers:
            await self._api.check_router(self._client, server.url)


def _pause_s(error: BaseException, attempts: int) -> float:
    """Return the seconds before a request is sent again; a full server may have named them."""
    if isinstance(error, ServerFullError):
        return min(_MAX_FULL_PAUSE_S, max(error.wait_s, _FULL_PAUSE_S * random.uniform(0.5, 1.5)))
    return backoff_s(error, attempts)
