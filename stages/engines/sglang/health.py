"""Which servers answer: a probe settles doubts, the lost are revived or awaited and checked when they return, and so is
what joins a router, or was started again without a request noticing."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.client import Answer, BusyError, LostError, UnreachedError, probe
from draftsmith.stages.engines.sglang.suspects import Asked

if TYPE_CHECKING:
    import httpx

_BEAT_S = 60.0  # a server that says nothing for so long while it has requests is probed
_PROBES = 4  # failed ones before a server counts as dead
_SILENT_S = 900.0  # of a server that is there and computes nothing; SGLang's watchdog ends a hung one after 300
_LONGEST_PAUSE_S = 30.0
_RETURN_S, _LONGEST_RETURN_S = 5.0, 60.0  # between two looks for a server that is down
_ALL_DOWN_RETURN_S = 15.0  # the same while all are down, for they have not long
_TICK_S = 1.0  # between two looks at whether they are
_DOUBLINGS = 60  # of a pause, which is at its longest by then; 2.0 ** 1024 is no float
_LATER = 5  # the look that is the first one at a server that is there, but whose answers are no use
_FOLLOW_S = 60.0  # between two looks at whether a server, or what stands behind a router, is what was checked


@dataclass
class Load:
    """What a server takes, as far as it has shown."""

    bound: float = math.inf  # requests at once, after a refusal; one more with every answer
    limit: float = math.inf  # requests at once, after one that was not finished in time
    limited_at: float = -math.inf
    last_s: float = math.inf  # that its last answer took
    refusals: int = 0  # in a row
    refused_since: float | None = None  # its last answer
    rests_until: float = -math.inf
    told: bool = False


class State(Enum):
    UP = "up"
    CHECKED = "checked"  # something went wrong: no new requests until a probe has settled it
    DOWN = "down"


@dataclass(eq=False)
class Server:
    """A server as the client sees it. Times are of the monotonic clock."""

    url: str
    state: State = State.UP
    reason: str = ""  # of its last failure
    requests: set[Asked] = field(default_factory=set)  # in flight
    lost: set[Asked] = field(default_factory=set)  # of those, since it was last known to be well
    bad: set[str] = field(default_factory=set)  # names of requests whose answers were bad, since its last good one
    replicas: int = 1  # of the model, which share its requests
    behind: tuple[str, ...] = ()  # of a router: the servers that it asks
    launched: bool = False  # by this process: nobody else starts it again
    load: Load = field(default_factory=Load)
    attempts: set[asyncio.Task[Answer]] = field(default_factory=set)
    answered_at: float = -math.inf  # when it last answered a request
    heard_at: float = field(default_factory=time.monotonic)  # that, or a probe or handshake
    down_at: float = -math.inf
    looked_at: bool = False  # it is down, and is being checked
    unreached: bool = False  # since it was checked: it may have been started again, as another one

    @property
    def in_flight(self) -> int:
        return len(self.requests)

    def answered(self) -> None:
        self.answered_at = self.heard_at = time.monotonic()


def pause(tries: int, first_s: float, longest_s: float = _LONGEST_PAUSE_S) -> float:
    """Seconds before a repetition: doubling, with jitter, so that requests lost together do not return together."""
    return min(longest_s, first_s * 2.0 ** min(tries - 1, _DOUBLINGS)) * random.uniform(0.5, 1.5)


class Health:
    """Keeps the states of `servers`; to be used inside one event loop.

    revive: asked when a server is dead; returns whether it is back (under a `url` that may be new). check: whether a
    server is still the right one; raises DraftsmithError if not, RetryableError if it does not answer. follow: checks
    a server that is another one by now, and what has joined a router, as `check` does. spawn: runs something in the
    background. changed: called when a state has changed.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        servers: Sequence[Server],
        *,
        log: Callable[[str], None],
        revive: Callable[[Server], Awaitable[bool]] | None,
        check: Callable[[Server], Awaitable[None]] | None,
        follow: Callable[[Server], Awaitable[None]] | None,
        spawn: Callable[[Coroutine[Any, Any, None]], None],
        changed: Callable[[], None],
        backoff_s: float,
    ):
        self._client, self._servers, self._log = client, servers, log
        self._revive, self._check, self._follow = revive, check, follow
        self._spawn, self._changed, self._backoff_s = spawn, changed, backoff_s

    def start(self) -> None:
        """Look for servers that are down from the beginning, and at those that are not launched here."""
        for server in self._servers:
            if server.state is State.DOWN and self.may_return(server):
                self._spawn(self._await_return(server))
        if self._follow is not None:
            self._spawn(self._follow_given(self._follow))

    async def probe(self, server: Server) -> None:
        """Does it compute? Of a router: is it there, and does one of its servers? Raises LostError."""
        failed: LostError | None = None
        try:
            await probe(self._client, server.url)
        except LostError as error:
            if not server.behind or isinstance(error, UnreachedError):
                raise
            failed = error  # a router asks one of its servers, which may be the one that is lost
        if server.behind:
            each = await asyncio.gather(*(probe(self._client, url) for url in server.behind), return_exceptions=True)
            errors = [error for error in each if error is not None]
            if len(errors) == len(each):
                raise failed or errors[0]
        server.heard_at = time.monotonic()

    async def computes(self, server: Server) -> None:
        """The same, without a probe where it has just answered a request."""
        if time.monotonic() - server.answered_at > _BEAT_S:
            await self.probe(server)

    def beat(self, server: Server) -> None:
        """To be called now and then while a request waits: a server that went dark breaks no connection."""
        if server.state is State.UP and time.monotonic() - server.heard_at > _BEAT_S:
            server.heard_at = time.monotonic()
            self._spawn(self._beat(server))

    async def _beat(self, server: Server) -> None:
        try:
            await self.probe(server)
        except LostError as error:
            self.suspect(server, error)
        except Exception as error:  # whatever it was, the examination says what is wrong
            self.suspect(server, LostError(_told(error)))

    def suspect(self, server: Server, error: LostError) -> None:
        """No new requests until a probe has shown that the server computes."""
        server.reason = str(error)
        server.unreached |= isinstance(error, UnreachedError)
        if server.state is State.UP:
            server.state = State.CHECKED
            self._spawn(self._examine(server))

    def distrust(self, server: Server, reason: str) -> None:
        """It computes, but what it answers is no use."""
        if server.state is State.UP:
            server.state, server.reason = State.CHECKED, reason
            self._spawn(self._lose(server, looks=_LATER))

    async def _examine(self, server: Server) -> None:
        """Decide whether a server is alive, and still the same one."""
        since, failures = time.monotonic(), 0
        for tries in count():
            if tries:
                await asyncio.sleep(pause(tries, self._backoff_s))
            try:
                await self.probe(server)
                # A connection that still holds a request, or has just answered one, is of the server that was checked.
                same = server.attempts or server.answered_at > since
                if server.unreached and not same and self._check is not None:
                    await self._check(server)
                self._up(server)
                return
            except BusyError as error:
                server.reason = str(error)
                if server.answered_at > since:
                    self._up(server)
                    return
                if time.monotonic() - since > _SILENT_S:
                    break
            except (LostError, RetryableError) as error:
                server.reason, failures = str(error), failures + 1
                server.unreached |= isinstance(error, UnreachedError)
                if failures == _PROBES:
                    break
            except Exception as error:  # a wrong server; or whatever it was: waiting requests must hear of it
                server.reason = _told(error)
                break
        for asked in server.requests | server.lost:
            asked.died.append(server.url)
        await self._lose(server)

    def _up(self, server: Server) -> None:
        server.state, server.unreached = State.UP, False
        server.lost.clear()
        server.bad.clear()
        server.heard_at = time.monotonic()
        self._changed()

    def _returned(self, server: Server) -> None:
        server.load = Load()  # it may have been started again, by other options or on another machine
        self._up(server)

    async def _lose(self, server: Server, looks: int = 1) -> None:
        """It gives up its requests, and is revived if that is possible. looks: as of `_await_return`."""
        self._log(f"SGLang server {server.url} is lost: {server.reason}")
        for attempt in list(server.attempts):
            attempt.cancel()
        server.lost.clear()
        self._changed()
        try:
            if self._revive is not None and await self._revive(server):
                self._returned(server)
                return
        except Exception as error:  # whatever it was, waiting requests must hear that nobody comes
            server.reason = _told(error)
        server.state, server.down_at = State.DOWN, time.monotonic()
        self._changed()
        if self.may_return(server):
            await self._await_return(server, looks)

    def may_return(self, server: Server) -> bool:
        """May somebody start it again?"""
        return self._check is not None and not server.launched

    async def _await_return(self, server: Server, looks: int = 1) -> None:
        """Look for a server that is down about once a minute, and check it as it was checked the first time. looks: the
        number that the first one counts as, for the pause before it."""
        assert self._check is not None
        for tries in count(looks):
            await self._rest(pause(tries, _RETURN_S, _LONGEST_RETURN_S))
            server.looked_at = True
            try:
                await self._check(server)
            except Exception as error:  # whatever it was, the others go on
                if not isinstance(error, RetryableError) and _told(error) != server.reason:
                    self._log(f"left out: {_told(error)}")
                server.reason = _told(error)
                continue
            finally:
                server.looked_at = False
                self._changed()
            self._log(f"SGLang server {server.url} is there again")
            self._returned(server)
            return

    async def _rest(self, seconds: float) -> None:
        """Shorter while all servers are down."""
        began = time.monotonic()
        while True:
            all_down = all(server.state is State.DOWN for server in self._servers)
            left = began + (min(seconds, _ALL_DOWN_RETURN_S) if all_down else seconds) - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, _TICK_S))

    async def _follow_given(self, follow: Callable[[Server], Awaitable[None]]) -> None:
        """What joins a router, or takes a server's place behind a gateway, gets requests at once: a wrong one is a
        reason to ask there no more."""
        while True:
            await asyncio.sleep(_FOLLOW_S)
            for server in self._servers:
                if server.state is State.UP and not server.launched:
                    try:
                        await follow(server)
                    except RetryableError:
                        continue  # at the next look
                    except Exception as error:
                        self.distrust(server, _told(error))
            self._changed()


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, DraftsmithError) else f"{type(error).__name__}: {error}"
