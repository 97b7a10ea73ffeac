"""Sends requests to servers: bounds and spreads them, and repeats elsewhere what was lost."""

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
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.retry import backoff_s, retry_on
from draftsmith.stages.engines.base import Completion
from draftsmith.stages.engines.sglang.client import Answer, FullError, LostError, SilentError, generate, probe
from draftsmith.stages.engines.sglang.records import BadAnswerError

if TYPE_CHECKING:
    import httpx

    from draftsmith.stages.engines.sglang.server import ServerProcess

_DEADLY = 2  # servers that died with a request: it is not sent again
_BEAT_S = 60.0  # a server that has requests and has answered none for so long is probed
_PATIENCE_S = 60.0  # with a server whose probes fail, before it is lost
_SILENT_S = 600.0  # with one that is there and computes nothing: it may compile; SGLang's watchdog ends it after 300
_FULL_S = 3600.0  # of a server that takes no request and answers none, before it is given up
_REST_S, _LONGEST_REST_S = 1.0, 600.0  # before a full server is asked again
_ABORT_TIMEOUT_S = 5.0


class LostTooOftenError(RetryableError):
    """A request was lost each time, on servers that are alive."""


class TimedOutError(DraftsmithError):
    """A request was not finished in time by a server that computes."""


class DeadlyRequestError(DraftsmithError):
    """Servers died while they had this request: it is not sent again."""


_TRIES: dict[type[Exception], int] = {LostError: 6, BadAnswerError: 3, TimedOutError: 2}


class Deaths:
    """Which servers died while they had a request. Kept in a file: the stage is retried when no server is left."""

    def __init__(self, path: Path):
        self._path = path
        self._servers: dict[str, list[str]] = json.loads(path.read_text("utf-8")) if path.exists() else {}

    def of(self, name: str) -> list[str]:
        return self._servers.get(name, [])

    def add(self, names: Collection[str], url: str) -> None:
        for name in names:
            self._servers.setdefault(name, []).append(url)
        self._write()

    def forget(self, names: Collection[str]) -> None:
        if known := self._servers.keys() & set(names):
            for name in known:
                del self._servers[name]
            self._write()

    def _write(self) -> None:
        write_text(self._path, json.dumps(self._servers, indent=2))


@dataclass(eq=False)
class Server:
    """A server as the client sees it, made inside the event loop. Times are of the monotonic clock."""

    url: str
    replicas: int = 1  # of the model, which share its requests
    behind: tuple[str, ...] = ()  # of a router: the servers that it asks
    processes: tuple[ServerProcess, ...] = ()  # started here: the one that listens at `url`, then those behind a router
    requests: set[str] = field(default_factory=set)  # in flight
    lost: str | None = None  # why it is asked no more
    gone: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    examination: asyncio.Task[None] | None = None  # no new requests meanwhile
    answered_at: float = field(default_factory=time.monotonic)
    was_full: bool = False

    def ended(self) -> str | None:
        """Return how its process ended, or the last one behind it; None: it runs, or was not started here."""
        ends = [process.ended() for process in self.processes]
        if not ends or not (ends[0] or (len(ends) > 1 and all(ends[1:]))):
            return None
        how, process = next((how, each) for how, each in zip(ends, self.processes, strict=True) if how)
        return f"{how} (log: {process.log_path})"


@dataclass(eq=False)
class _Asked:
    """A request that is to be answered."""

    name: str
    payload: dict[str, Any]
    read: Callable[[Answer], Completion]
    avoid: Server | None = None  # where it failed last: asked only where no other server is left
    failures: int = 0  # attempts that count: the refusal of a full server is none

    def given_up(self, error: BaseException) -> bool:
        """Return whether it is not sent again after this error."""
        if isinstance(error, FullError):
            assert self.avoid is not None
            return time.monotonic() - self.avoid.answered_at > _FULL_S
        self.failures += 1
        return self.failures >= next(tries for kind, tries in _TRIES.items() if isinstance(error, kind))


class ServerPool:
    """Spreads requests over servers; to be used inside one event loop.

    concurrency: requests in flight, a replica. stream: measure the first token's time.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: list[Server],
        *,
        concurrency: int,
        timeout_s: float,
        deaths: Deaths,
        log: Callable[[str], None],
        stream: bool = False,
    ):
        self.servers, self.deaths = servers, deaths
        self.repeated = 0  # attempts at requests that had to be made again
        self._client, self._stream, self._timeout_s = client, stream, timeout_s
        self._concurrency, self._log = concurrency, log
        self._total: int | None = None
        self._changed = asyncio.Event()
        self._asking: set[asyncio.Task[Any]] = set()
        self._reported: set[ServerProcess] = set()

    @property
    def capacity(self) -> int:
        """Return how many requests are in flight while no server is lost."""
        return self._total or sum(self._concurrency * server.replicas for server in self.servers)

    def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: back to the bound of every server."""
        self._total = total
        self._wake()

    async def ask(self, name: str, payload: dict[str, Any], read: Callable[[Answer], Completion]) -> Completion:
        """POST /generate to the least loaded server, and elsewhere again, until `read` takes the answer.

        Raises RefusedRequestError if a server does not take the request, TimedOutError, BadAnswerError or
        LostTooOftenError after the last attempt, DeadlyRequestError if servers died with it, RetryableError if no
        server is left.
        """
        asked = _Asked(name, payload, read)
        again = retry_on(
            tuple(_TRIES),
            give_up=lambda error, _attempts, _seconds: asked.given_up(error),
            pause_s=_pause_s,
            on_retry=lambda error, _attempts: self._note(asked, error),
        )
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            return await again(self._attempt)(asked)
        except LostError as error:
            raise LostTooOftenError(
                f"request {name}: was lost each time, the last time: {error}. Look at the server's log."
            ) from error
        finally:
            self._asking.discard(task)

    def _note(self, asked: _Asked, error: BaseException) -> None:
        assert asked.avoid is not None
        if isinstance(error, FullError):
            if not asked.avoid.was_full:
                asked.avoid.was_full = True
                self._log(
                    f"SGLang server {asked.avoid.url} is full: it {error}. Requests wait; lower engine.concurrency."
                )
            return
        self.repeated += 1
        if isinstance(error, BadAnswerError):
            self._log(f"asked for again: {error} ({asked.avoid.url})")

    async def _attempt(self, asked: _Asked) -> Completion:
        """Ask one server."""
        server = await self._reserve(asked)
        try:
            return asked.read(await self._post(server, asked))
        except (LostError, BadAnswerError, TimedOutError):
            asked.avoid = server
            raise
        finally:
            server.requests.discard(asked.name)
            self._wake()

    async def _reserve(self, asked: _Asked) -> Server:
        """Wait for a server with room."""
        while True:
            if len(died := self.deaths.of(asked.name)) >= _DEADLY:
                raise DeadlyRequestError(
                    f"request {asked.name}: was in flight when {len(died)} SGLang servers died ({', '.join(died)}), "
                    "and is not sent again. Look at the ends of their logs."
                )
            there = [server for server in self.servers if server.lost is None]
            if not there:
                gone = "; ".join(f"{server.url} {server.lost}" for server in self.servers)
                raise RetryableError(
                    f"request {asked.name}: no SGLang server is left: {gone}. Start those of engine.urls again "
                    "and run the same command, finished answers are kept."
                )
            others = [server for server in there if server is not asked.avoid] or there
            if free := [server for server in others if self._has_room(server)]:
                server = min(free, key=lambda server: len(server.requests) / server.replicas)
                server.requests.add(asked.name)
                return server
            await self._changed.wait()

    def _has_room(self, server: Server) -> bool:
        if server.examination is not None:
            return False
        if self._total is not None:
            return sum(len(each.requests) for each in self.servers) < self._total
        return len(server.requests) < self._concurrency * server.replicas

    def _wake(self) -> None:
        """Let requests that wait for a server look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _post(self, server: Server, asked: _Asked) -> Answer:
        """POST /generate once. What was lost is raised when it is known whether the server still lives."""
        rid = uuid.uuid4().hex
        payload = {**asked.payload, "rid": rid}
        post = asyncio.create_task(generate(self._client, server.url, asked.name, payload, stream=self._stream))
        try:
            if not await self._answered(server, post):
                await self._examine(server)
                if server.lost is not None:
                    raise LostError(server.lost)
                raise TimedOutError(
                    f"request {asked.name}: {server.url} computes, but did not finish it in {self._timeout_s:g} s "
                    "(engine.request_timeout_s). Raise it, or lower engine.concurrency (requests wait for each other) "
                    "or sampling.max_new_tokens."
                )
            answer = post.result()
        except FullError:
            raise
        except LostError:
            if server.lost is None:
                await self._examine(server)
            raise
        finally:
            if not post.done():
                post.cancel()
                await self._abort(server, rid)
        server.answered_at = time.monotonic()
        self.deaths.forget([asked.name])
        return answer

    async def _answered(self, server: Server, post: asyncio.Task[Answer]) -> bool:
        """Wait for an answer, at most as long as the config says. Raises LostError if the server is lost meanwhile."""
        deadline = time.monotonic() + self._timeout_s
        either: set[asyncio.Future[Any]] = {post, server.gone}
        while not post.done():
            if (left := deadline - time.monotonic()) <= 0:
                return False
            await asyncio.wait(either, timeout=min(left, _BEAT_S), return_when=asyncio.FIRST_COMPLETED)
            if not post.done() and server.lost is not None:
                raise LostError(server.lost)
            if not post.done() and time.monotonic() - server.answered_at > _BEAT_S:
                self._examine(server)  # one that went dark breaks no connection
        return True

    async def _abort(self, server: Server, rid: str) -> None:
        if server.lost is None:
            for url in server.behind or (server.url,):
                with suppress(Exception):
                    await self._client.post(f"{url}/abort_request", json={"rid": rid}, timeout=_ABORT_TIMEOUT_S)

    def _examine(self, server: Server) -> Awaitable[None]:
        """Find out whether a server still lives: once for all requests that wonder, and whoever waits for it."""
        if server.examination is None:
            server.examination = asyncio.create_task(self._examined(server))
        return asyncio.shield(server.examination)

    async def _examined(self, server: Server) -> None:
        since = time.monotonic()

        async def look() -> None:
            if server.answered_at < since:
                await self._probe(server)

        def given_up(error: BaseException, _attempts: int, seconds: float) -> bool:
            limit_s = _SILENT_S if isinstance(error, SilentError) else _PATIENCE_S
            return server.ended() is not None or seconds > limit_s

        try:
            await retry_on(LostError, give_up=given_up)(look)()
        except Exception as error:  # whatever it was, requests must not wait for ever
            self.deaths.add(server.requests, server.url)
            self._lose(server, server.ended() or str(error))
        finally:
            self._report_processes(server)
            server.examination = None
            self._wake()

    async def _probe(self, server: Server) -> None:
        """Ask whether it computes; of a router, whether it is there and one of its servers computes."""
        import httpx

        urls = server.behind or (server.url,)
        each = await asyncio.gather(*(probe(self._client, url) for url in urls), return_exceptions=True)
        errors = [error for error in each if error is not None]
        if len(errors) == len(urls):
            raise errors[0]
        if server.behind:
            try:
                await self._client.get(f"{server.url}/workers", timeout=_ABORT_TIMEOUT_S)
            except httpx.HTTPError as error:
                raise LostError(f"{type(error).__name__} {error}") from error

    def _lose(self, server: Server, why: str) -> None:
        """Ask it no more; what it has in flight goes to the others."""
        if server.lost is None:
            server.lost = why
            self._log(f"SGLang server {server.url} is lost: {why}")
            server.gone.set_result(None)
            self._wake()

    def _report_processes(self, server: Server) -> None:
        for process in server.processes:
            if (how := process.ended()) and process not in self._reported:
                self._reported.add(process)
                self._log(f"{process.url} {how}; the end of {process.log_path}:\n{process.tail()}")

    async def close(self) -> None:
        """Abort what is in flight."""
        tasks = [*self._asking, *(each.examination for each in self.servers if each.examination is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _pause_s(error: BaseException, attempts: int) -> float:
    """Return the seconds before a request is sent again; a full server may say them itself."""
    if isinstance(error, FullError):
        return min(_LONGEST_REST_S, max(error.wait_s, _REST_S * random.uniform(0.5, 1.5)))
    return backoff_s(error, attempts)
