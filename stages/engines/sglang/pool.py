"""Requests to several servers: bounded, spread, repeated when something is lost, moved away from a server that died."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.client import Answer, BusyError, LostError, UnreachedError, generate
from draftsmith.stages.engines.sglang.health import Health, Server, State, pause
from draftsmith.stages.engines.sglang.suspects import Asked, named

if TYPE_CHECKING:
    import httpx

_LOOK_S = 10.0  # between two looks at a server that has not answered yet
_ABORT_TIMEOUT_S = 5.0
_ALL_DOWN_S = 120.0  # so long a request waits for a server to return
_PATIENCE_S = 3600.0  # with a server that takes no request and answers none
_LONGEST_REST_S = 600.0
_BAD_IN_A_ROW = 5  # requests whose answers are bad, before their server is asked no more


class LostTooOftenError(RetryableError):
    """A request was lost once more than it is repeated, on servers that are alive."""


class TimedOutError(DraftsmithError):
    """A request was not finished in time by a server that computes."""


class NotSentError(Exception):
    """Nothing is sent any more."""


class _GivenUpError(LostError):
    """The server was lost while it had the request."""


class ServerPool:
    """Spreads requests over servers; to be used inside one event loop.

    concurrency: requests in flight, a replica. retries: of one request. revive, check, follow: as `Health` takes them.
    stream: measure the first token's time. backoff_s: the first pause before a repetition; it doubles.
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
        check: Callable[[Server], Awaitable[None]] | None = None,
        follow: Callable[[Server], Awaitable[None]] | None = None,
        stream: bool = False,
        backoff_s: float = 0.5,
    ):
        self.servers = servers
        self.repeated = 0  # attempts at requests that had to be made again
        self._client, self._stream, self._timeout_s = client, stream, timeout_s
        self._concurrency, self._retries, self._backoff_s, self._log = concurrency, retries, backoff_s, log
        self._total: int | None = None
        self._holding = False
        self._waiters: list[asyncio.Future[None]] = []
        self._asking: dict[asyncio.Task[Any], Asked] = {}
        self._aborting: set[asyncio.Task[None]] = set()
        self._watching: set[asyncio.Task[None]] = set()
        self.health = Health(
            client,
            servers,
            log=log,
            revive=revive,
            check=check,
            follow=follow,
            spawn=self._watch,
            changed=self._wake,
            backoff_s=backoff_s,
        )
        self.health.start()

    @property
    def places(self) -> int:
        """Requests that are in flight while every server is up."""
        return self._total or sum(self._concurrency * server.replicas for server in self.servers)

    def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: back to the bound of every server."""
        self._total = total
        self._wake()

    def hold(self, holding: bool) -> None:
        """Send nothing any more: what waits to be sent ends with NotSentError, what is in flight goes on."""
        self._holding = holding
        self._wake()

    async def ask(self, name: str, payload: dict[str, Any], avoid: str = "") -> Answer:
        """POST /generate to the least loaded server until it is answered. avoid: the url of one that is asked only
        where no other is up.

        Raises RefusedRequestError if a server does not take the request, TimedOutError if it was not finished in time
        twice, LostTooOftenError if it was lost once more than `retries`, DeadlyRequestError if servers died with it,
        RetryableError if no server is left.
        """
        task = asyncio.current_task()
        assert task is not None
        self._asking[task] = asked = Asked(name)
        try:
            return await self._ask(asked, payload, self._server_at(avoid))
        finally:
            del self._asking[task]

    def accept(self, url: str) -> None:
        """An answer of this server is what was asked for."""
        if (server := self._server_at(url)) is not None:
            server.bad.clear()

    def reject(self, url: str, name: str, reason: str) -> None:
        """An answer to this request is not what was asked for. A server that gives no other is lost, unless it is the
        last one: then the requests may be the cause."""
        self.repeated += 1
        server = self._server_at(url)
        if server is None:
            return
        server.bad.add(name)
        others = any(each is not server and each.state is State.UP for each in self.servers)
        if others and len(server.bad) >= _BAD_IN_A_ROW:
            self.health.distrust(server, f"gave bad answers to {len(server.bad)} requests in a row, the last: {reason}")

    def _server_at(self, url: str) -> Server | None:
        return next((each for each in self.servers if each.url == url), None)

    async def _ask(self, asked: Asked, payload: dict[str, Any], avoid: Server | None) -> Answer:
        failures, timed_out = 0, False
        full: Server | None = None
        while True:
            server = await self._place(asked, avoid, full)
            try:
                return await self._attempt(server, asked.name, payload)
            except TimedOutError:
                if timed_out:
                    raise
                timed_out, avoid = True, server
                self.repeated += 1
            except _GivenUpError:
                failures, avoid = failures + 1, server
            except LostError as error:
                if isinstance(error, BusyError) and self._rest(server, error):
                    full = server
                else:
                    failures, avoid = failures + 1, server
                    server.lost.add(asked)
                    self.health.suspect(server, error)
            finally:
                server.requests.discard(asked)
                self._wake()
            if failures > self._retries:
                raise LostTooOftenError(
                    f"request {asked.name}: failed {failures} times, the last time on {server.url} {server.reason}; "
                    "look at the server's log"
                )
            if failures:
                self.repeated += 1
                await asyncio.sleep(pause(failures, self._backoff_s))

    async def _place(self, asked: Asked, avoid: Server | None, full: Server | None = None) -> Server:
        """Wait for a server with room. avoid: where the request has failed, which is asked only where no other is up,
        however full. full: one that has just not taken it, which comes last."""
        while not self._holding:
            asked.check()
            if free := self._free(asked, avoid):
                server = min(free, key=lambda server: (server is full, server.in_flight / server.replicas))
                server.requests.add(asked)
                return server
            longest = self._longest_wait(asked.name)
            self._waiters.append(waiter := asyncio.get_running_loop().create_future())
            with suppress(TimeoutError):
                async with asyncio.timeout(longest):
                    await waiter
        raise NotSentError

    def _free(self, asked: Asked, avoid: Server | None) -> list[Server]:
        """Servers that may be asked for this now."""
        examined = [server for server in self.servers if server.state is State.CHECKED]
        if asked.waits(sum(asked in server.lost for server in examined)):
            return []
        up = [server for server in self.servers if server.state is State.UP]
        others = [server for server in up if server is not avoid]
        now = time.monotonic()
        ready = [server for server in others or up if server.load.rests_until <= now]
        if self._total is None:
            free = [server for server in ready if server.in_flight < self._room(server)]
        else:
            free = ready if sum(server.in_flight for server in self.servers) < self._total else []
        return [server for server in free if asked.fits(server.requests)]

    def _room(self, server: Server) -> float:
        return min(self._concurrency * server.replicas, server.load.bound, server.load.limit)

    def _longest_wait(self, name: str) -> float | None:
        """Seconds until all servers have been down for too long; None: one is there, or may be. Raises RetryableError
        then."""
        if any(server.state is not State.DOWN or server.looked_at for server in self.servers):
            return None
        left = max(server.down_at for server in self.servers) + _ALL_DOWN_S - time.monotonic()
        if left > 0 and any(map(self.health.may_return, self.servers)):
            return left
        gone = "; ".join(f"{server.url} {server.reason}" for server in self.servers)
        raise RetryableError(
            f"request {name}: no SGLang server is left: {gone}; start them again and run the same command "
            f"(finished answers are kept){named(self._asking.values())}"
        )

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _rest(self, server: Server, error: BusyError) -> bool:
        """A server takes no more at the moment: it is asked for what it has, and later. Whether to be patient."""
        load, now = server.load, time.monotonic()
        load.bound = max(1, min(load.bound, server.in_flight - 1))
        load.refused_since = load.refused_since or now
        if not load.told:
            load.told = True
            self._log(f"SGLang server {server.url} is full: it {error}; requests wait (lower engine.concurrency)")
        if now >= load.rests_until:  # not for each of those that were refused together
            load.refusals += 1
            rest_s = min(_LONGEST_REST_S, max(error.wait_s, pause(load.refusals, self._backoff_s)))
            load.rests_until = now + rest_s
            asyncio.get_running_loop().call_later(rest_s, self._wake)
        return now - load.refused_since < _PATIENCE_S

    def _answered(self, server: Server, answer: Answer) -> None:
        server.answered()
        load = server.load
        load.bound, load.refusals, load.refused_since, load.last_s = load.bound + 1, 0, None, answer.seconds

    def _relieve(self, server: Server, sent: float) -> None:
        """A request was not finished in time: if others take long too, they wait for each other."""
        load = server.load
        if server.in_flight > 1 and load.last_s > self._timeout_s / 2 and sent > load.limited_at:
            load.limit, load.limited_at = server.in_flight // 2, time.monotonic()
            self._log(
                f"SGLang server {server.url} did not finish a request in {self._timeout_s:g} s with {server.in_flight} "
                f"in flight: it gets {load.limit} at once from here on (lower engine.concurrency, or raise "
                "engine.request_timeout_s)"
            )

    async def _attempt(self, server: Server, name: str, payload: dict[str, Any]) -> Answer:
        """One POST, as a task of its own: a server that is found dead gives up its requests at once."""
        rid, sent = uuid.uuid4().hex, time.monotonic()
        post = generate(self._client, server.url, name, {**payload, "rid": rid}, stream=self._stream)
        attempt = asyncio.create_task(post)
        server.attempts.add(attempt)
        try:
            while (left := sent + self._timeout_s - time.monotonic()) > 0:
                if (await asyncio.wait({attempt}, timeout=min(left, _LOOK_S)))[0]:
                    if attempt.cancelled():
                        raise _GivenUpError(server.reason)
                    answer = attempt.result()
                    self._answered(server, answer)
                    return answer
                self.health.beat(server)
        except asyncio.CancelledError:
            _start(self._abort(server, rid), self._aborting)  # nobody waits for the answer
            raise
        finally:
            attempt.cancel()
            server.attempts.discard(attempt)
        _start(self._abort(server, rid), self._aborting)
        error = await self._timed_out(server, name, payload)
        if isinstance(error, TimedOutError):
            self._relieve(server, sent)
        raise error

    async def _timed_out(self, server: Server, name: str, payload: dict[str, Any]) -> Exception:
        """The error of a request that was not answered in time: is it the server, or the request?"""
        limit = f"{self._timeout_s:g} s (engine.request_timeout_s)"
        try:
            await self.health.computes(server)
        except LostError as error:
            kind = UnreachedError if isinstance(error, UnreachedError) else LostError
            return kind(f"gave no answer in {limit}, and {error}")
        return TimedOutError(
            f"request {name}: {server.url} computes, but did not finish it in {limit}, the second time too; it had up "
            f"to {payload['sampling_params']['max_new_tokens']} tokens to write: raise engine.request_timeout_s, or "
            "lower engine.concurrency (requests wait for each other) or sampling.max_new_tokens"
        )

    async def _abort(self, server: Server, rid: str) -> None:
        for url in server.behind or (server.url,):
            with suppress(Exception):
                await self._client.post(f"{url}/abort_request", json={"rid": rid}, timeout=_ABORT_TIMEOUT_S)

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        _start(work, self._watching)

    async def close(self) -> None:
        """Abort what is in flight; end everything else."""
        ending = [*self._asking, *self._watching]
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        if self._aborting:
            _, late = await asyncio.wait(self._aborting, timeout=_ABORT_TIMEOUT_S)
            for task in late:
                task.cancel()


def _start(work: Coroutine[Any, Any, None], running: set[asyncio.Task[None]]) -> None:
    """In the background; `running` keeps it, for the event loop does not."""
    task = asyncio.get_running_loop().create_task(work)
    running.add(task)
    task.add_done_callback(running.discard)
