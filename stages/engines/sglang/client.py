"""Requests to several servers: bounded, spread, repeated when something is lost, moved away from a server that died."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError

if TYPE_CHECKING:
    import httpx

_LONGEST_PAUSE_S = 30.0
_PROBE_TIMEOUT_S = 60.0  # a busy server queues the probe
_PROBES = 4  # failed ones before a server counts as dead
_ABORT_TIMEOUT_S = 5.0
_BUSY = frozenset({408, 425, 429})
_KEY_ASKED_FOR = frozenset({401, 403})
_ONE_PIECE = 1 << 30  # as stream_interval: the first token at once, all others together


@dataclass(frozen=True)
class Answer:
    """The body of a finished /generate, and its times as the client saw them."""

    body: dict[str, Any]
    seconds: float
    first_token_seconds: float = float("nan")
    url: str = ""  # of the server


class LostError(Exception):
    """An attempt that may succeed when repeated: no connection, a 5xx answer, a time-out, an abort by the server."""


class State(Enum):
    UP = "up"
    CHECKED = "checked"  # something went wrong: no new requests until it has generated, or was started again
    DOWN = "down"


@dataclass(eq=False)
class Server:
    """A server as the client sees it."""

    url: str
    state: State = State.UP
    reason: str = ""  # of its last failure
    in_flight: int = 0
    replicas: int = 1  # of the model, which share its requests
    behind: tuple[str, ...] = ()  # of a router: the servers that it asks
    attempts: set[asyncio.Task[Answer]] = field(default_factory=set)


class ServerPool:
    """Spreads requests over servers; to be used inside one event loop.

    concurrency: requests in flight, a replica. retries: of one request. revive: asked when a server is dead; returns
    whether it is back (under a `url` that may be new). stream: measure the first token's time. backoff_s: the first
    pause before a repetition; it doubles.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: list[Server],
        *,
        concurrency: int,
        timeout_s: float,
        retries: int,
        log: Callable[[str], None],
        revive: Callable[[Server], Awaitable[bool]] | None = None,
        stream: bool = False,
        backoff_s: float = 0.5,
    ):
        self.servers = servers
        self._client, self._stream, self._timeout_s = client, stream, timeout_s
        self._concurrency, self._retries, self._backoff_s = concurrency, retries, backoff_s
        self._log, self._revive = log, revive
        self._total: int | None = None
        self._waiters: list[asyncio.Future[None]] = []
        self._asking: set[asyncio.Task[Any]] = set()
        self._background: set[asyncio.Task[None]] = set()

    @property
    def places(self) -> int:
        """Requests that are in flight while every server is up."""
        return self._total or sum(self._room(server) for server in self.servers)

    def _room(self, server: Server) -> int:
        return self._concurrency * server.replicas

    def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: back to the bound of every server."""
        self._total = total
        self._wake()

    async def ask(self, name: str, payload: dict[str, Any], avoid: str = "") -> Answer:
        """POST /generate to the least loaded server until it is answered. avoid: the url of one to ask last.

        Raises DraftsmithError if a server refuses the request, RetryableError if it was lost once more than `retries`
        or no server is left.
        """
        task = asyncio.current_task()
        assert task is not None
        self._asking.add(task)
        try:
            return await self._ask(name, payload, next((each for each in self.servers if each.url == avoid), None))
        finally:
            self._asking.discard(task)

    async def _ask(self, name: str, payload: dict[str, Any], avoid: Server | None) -> Answer:
        for failures in range(self._retries + 1):
            if failures:
                await asyncio.sleep(self._pause(failures))
            server = await self._place(name, avoid)
            try:
                return await self._attempt(server, name, payload)
            except LostError as error:
                avoid = server
                self._suspect(server, str(error))
            finally:
                server.in_flight -= 1
                self._wake()
        assert avoid is not None
        raise RetryableError(
            f"request {name}: failed {self._retries + 1} times, the last time on {avoid.url} {avoid.reason}; look at "
            "the server's log, then run the same command again (finished answers are kept)"
        )

    def _pause(self, failures: int) -> float:
        """Seconds before a repetition: doubling, with jitter, so that requests lost together do not return together."""
        return min(_LONGEST_PAUSE_S, self._backoff_s * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.5)

    async def _place(self, name: str, avoid: Server | None) -> Server:
        """Wait for a server with room; not the one that has just failed, if there is another."""
        while True:
            up = [server for server in self.servers if server.state is State.UP]
            if self._total is None:
                free = [server for server in up if server.in_flight < self._room(server)]
            else:
                free = up if sum(server.in_flight for server in self.servers) < self._total else []
            if free:
                server = min(free, key=lambda server: (server is avoid, server.in_flight / server.replicas))
                server.in_flight += 1
                return server
            if all(server.state is State.DOWN for server in self.servers):
                gone = "; ".join(f"{server.url} {server.reason}" for server in self.servers)
                raise RetryableError(
                    f"request {name}: no SGLang server is left: {gone}; start them again and run the same command "
                    "(finished answers are kept)"
                )
            self._waiters.append(waiter := asyncio.get_running_loop().create_future())
            await waiter

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def _attempt(self, server: Server, name: str, payload: dict[str, Any]) -> Answer:
        """One POST, as a task of its own: a server that is found dead gives up its requests at once."""
        url, rid = server.url, uuid.uuid4().hex
        post = _generate(self._client, url, name, {**payload, "rid": rid}, self._timeout_s, self._stream)
        attempt = asyncio.create_task(post)
        server.attempts.add(attempt)
        task = asyncio.current_task()
        assert task is not None
        try:
            return await asyncio.shield(attempt)
        except asyncio.CancelledError:
            if attempt.cancelled() and not task.cancelling():
                raise LostError(server.reason) from None
            self._spawn(self._abort(server, rid))  # nobody waits for the answer
            raise
        except TimeoutError:
            self._spawn(self._abort(server, rid))
            raise LostError(f"gave no answer in {self._timeout_s:g} s (engine.request_timeout_s)") from None
        finally:
            attempt.cancel()
            server.attempts.discard(attempt)

    async def _abort(self, server: Server, rid: str) -> None:
        for url in server.behind or (server.url,):
            with suppress(Exception):
                await self._client.post(f"{url}/abort_request", json={"rid": rid}, timeout=_ABORT_TIMEOUT_S)

    def _suspect(self, server: Server, reason: str) -> None:
        """No new requests until the server has shown that it still generates."""
        server.reason = reason
        if server.state is State.UP:
            server.state = State.CHECKED
            self._spawn(self._examine(server))

    async def _examine(self, server: Server) -> None:
        """Decide whether a server is alive; a dead one gives up its requests, and is revived if that is possible."""
        for failures in range(_PROBES):
            if failures:
                await asyncio.sleep(self._pause(failures))
            try:
                await self._probe(server.url)
            except (LostError, DraftsmithError) as error:
                server.reason = str(error)
                continue
            server.state = State.UP
            self._wake()
            return
        self._log(f"SGLang server {server.url} is lost: {server.reason}")
        for attempt in list(server.attempts):
            attempt.cancel()
        back = False
        try:
            back = self._revive is not None and await self._revive(server)
        except Exception as error:  # whatever it was, waiting requests must hear that nobody comes
            server.reason = str(error)
        server.state = State.UP if back else State.DOWN
        self._wake()

    async def _probe(self, url: str) -> None:
        payload = {"input_ids": [0], "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
        try:
            await _generate(self._client, url, "of the health check", payload, _PROBE_TIMEOUT_S)
        except TimeoutError:
            raise LostError(f"gave no answer to a probe in {_PROBE_TIMEOUT_S:g} s") from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        """Abort what is in flight; end everything else."""
        asking = list(self._asking)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=_ABORT_TIMEOUT_S)
            for task in late:
                task.cancel()


async def _generate(
    client: httpx.AsyncClient, url: str, name: str, payload: dict[str, Any], timeout_s: float, stream: bool = False
) -> Answer:
    """One POST /generate. Raises TimeoutError, LostError, or DraftsmithError if the server refuses the request."""
    import httpx

    started = time.perf_counter()
    first_token: float | None = None
    body: dict[str, Any] = {}
    try:
        async with asyncio.timeout(timeout_s):
            if not stream:
                response = await client.post(f"{url}/generate", json=payload)
                check_status(name, url, response.status_code, response.text)
                body = response.json()
            else:
                sampling = {**payload["sampling_params"], "stream_interval": _ONE_PIECE}
                payload = {**payload, "sampling_params": sampling, "stream": True}
                async with client.stream("POST", f"{url}/generate", json=payload) as response:
                    if response.status_code != 200:
                        check_status(name, url, response.status_code, (await response.aread()).decode())
                    async for line in response.aiter_lines():
                        if not line.startswith("data: {"):
                            continue  # blank, or the closing [DONE]
                        body = json.loads(line.removeprefix("data: "))
                        if error := body.get("error"):
                            check_status(name, url, int(error.get("code") or 500), str(error.get("message")))
                        if first_token is None and body.get("output_ids"):
                            first_token = time.perf_counter() - started
        reason = body["meta_info"]["finish_reason"]
        kind = reason["type"]
    except httpx.HTTPError as error:
        raise LostError(f"{type(error).__name__} {error}".rstrip()) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LostError(f"gave an answer that cannot be read ({type(error).__name__}: {error})") from error
    if kind == "abort":
        raise LostError(f"aborted the request: {reason.get('message')}")
    seconds = time.perf_counter() - started
    return Answer(body, seconds, float("nan") if first_token is None else first_token, url)


def key_header(api_key: str | None) -> dict[str, str]:
    """How a request shows the server's API key."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def check_status(name: str, url: str, status: int, text: str) -> None:
    """Raise LostError for an answer that may be another next time, DraftsmithError for one that says no."""
    if status == 200:
        return
    what = f"status {status}: {' '.join(text.split())[:300]}"
    if status >= 500 or status in _BUSY:
        raise LostError(f"answered with {what}")
    advice = ": name the variable of the environment that holds its API key in engine.api_key_env"
    raise DraftsmithError(f"request {name}: {url} refuses it with {what}{advice if status in _KEY_ASKED_FOR else ''}")
