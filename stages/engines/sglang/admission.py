"""Which servers are asked: those that passed the handshake and are alike, at the start and whenever one returns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.handshake import Facts, is_another, records_through, shake_hands
from draftsmith.stages.engines.sglang.health import Server, State
from draftsmith.stages.engines.sglang.router import workers_behind

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class Found:
    """What answers at an address: a server, or a router and the servers behind it."""

    facts: dict[str, Facts]  # by address
    through: bool | None = None  # of a router: do records of verify steps come through it?

    @property
    def replicas(self) -> int:
        return sum(facts.replicas for facts in self.facts.values())

    @property
    def behind(self) -> tuple[str, ...]:
        return () if self.through is None else tuple(self.facts)

    @property
    def records_trace(self) -> bool:
        return self.through is not False and all(facts.records_trace for facts in self.facts.values())

    @property
    def greedy_only(self) -> bool:
        return any(facts.greedy_only for facts in self.facts.values())


class Admission:
    """What the servers of a stage have in common, and who is let in beside them."""

    def __init__(self, client: httpx.AsyncClient, expected: Expected, log: Callable[[str], None]):
        self._client, self._expected, self._log = client, expected, log
        self._found: dict[Server, Found] = {}
        self._told: set[str] = set()

    @property
    def facts(self) -> dict[str, Facts]:
        return {url: facts for found in self._found.values() for url, facts in found.facts.items()}

    @property
    def records_trace(self) -> bool:
        return all(found.records_trace for found in self._found.values())

    @property
    def greedy_only(self) -> bool:
        return any(found.greedy_only for found in self._found.values())

    async def admit(self, servers: Sequence[Server]) -> list[Server]:
        """Those that passed. One that does not answer is DOWN while there are others, a wrong one is an error."""
        looks = (self._look(server.url) for server in servers)
        each = await asyncio.gather(*looks, return_exceptions=True)
        absent: list[RetryableError] = []
        for server, found in zip(servers, each, strict=True):
            if isinstance(found, RetryableError):
                server.state, server.reason = State.DOWN, str(found)
                absent.append(found)
            elif isinstance(found, BaseException):
                raise found
            else:
                self._take(server, found)
        if len(absent) == len(servers):
            raise absent[0]
        for error in absent:
            self._log(f"left out: {error}")
        if len(self._algorithms) > 1:
            told = ", ".join(f"{url}: {facts.algorithm or 'none'}" for url, facts in self.facts.items())
            raise DraftsmithError(
                f"engine.urls: the servers speculate differently ({told}); give servers that are alike"
            )
        return [server for server in servers if server.state is State.UP]

    async def admit_router(self, router: Server, workers: Sequence[Server]) -> None:
        """In front of servers that have passed."""
        facts = {url: each for worker in workers for url, each in self._found[worker].facts.items()}
        self._take(router, Found(facts, await records_through(self._client, router.url, self._expected)))

    async def check(self, server: Server) -> None:
        """Whether a server that was away may be asked: it may have been started again, as another one.

        Raises DraftsmithError if not, RetryableError if it does not answer.
        """
        found = await self._look(server.url)
        self._compare(server, found)
        self._take(server, found)

    async def follow(self, server: Server) -> None:
        """Check a server that was started again since the last look, or has other weights. Raises as `check` does."""
        known = self._found[server]
        if known.through is not None:
            await self._follow_router(server, known)
        elif await is_another(self._client, server.url, known.facts[server.url]):
            await self.check(server)

    async def _follow_router(self, router: Server, known: Found) -> None:
        """The same of all behind a router, and of what has joined it; what has left is forgotten. What does not answer
        counts when it does."""
        workers = await workers_behind(self._client, router.url) or []
        stayed = [worker for worker in workers if worker in known.facts]
        again = await asyncio.gather(*(is_another(self._client, url, known.facts[url]) for url in stayed))
        same = {worker for worker, other in zip(stayed, again, strict=True) if not other}
        joined = [worker for worker in workers if worker not in same]
        if not workers or (not joined and same == set(known.facts)):
            return  # without any it is the requests that hear of it
        hands = (shake_hands(self._client, worker, self._expected, self._log) for worker in joined)
        each = await asyncio.gather(*hands, return_exceptions=True)
        if wrong := [
            error for error in each if isinstance(error, BaseException) and not isinstance(error, RetryableError)
        ]:
            raise wrong[0]
        facts = known.facts | {worker: f for worker, f in zip(joined, each, strict=True) if isinstance(f, Facts)}
        if not (kept := {worker: facts[worker] for worker in workers if worker in facts}):
            return
        found = Found(kept, known.through)
        if joined:
            found = replace(found, through=await records_through(self._client, router.url, self._expected))
            self._compare(router, found)
        self._take(router, found)

    def _compare(self, server: Server, found: Found) -> None:
        """Answers of one stage are of one kind. Raises DraftsmithError for what would give others."""
        unlike = ""
        if (algorithms := {facts.algorithm for facts in found.facts.values()}) - self._algorithms:
            served, asked = (", ".join(sorted(a or "none" for a in each)) for each in (algorithms, self._algorithms))
            unlike = f"speculates by {served}, not by {asked}"
        elif self.records_trace and not found.records_trace:
            unlike = "does not record verify steps (no plug-in)"
        elif found.greedy_only and not self.greedy_only:
            unlike = "verifies greedily"
        if unlike:
            raise DraftsmithError(
                f"engine: the server {server.url} {unlike}, unlike those that this stage has asked; start it as these"
            )

    @property
    def _algorithms(self) -> set[str | None]:
        return {facts.algorithm for facts in self.facts.values()}

    async def _look(self, url: str) -> Found:
        """Check whatever answers there; all servers behind a router, for any of them may answer."""
        workers = await workers_behind(self._client, url)
        if workers is None:
            return Found({url: await shake_hands(self._client, url, self._expected, self._log)})
        if not workers:
            raise RetryableError(f"engine.urls: the router {url} has no healthy server; start them, then run again")
        each = await asyncio.gather(
            *(shake_hands(self._client, worker, self._expected, self._log) for worker in workers)
        )
        through = await records_through(self._client, url, self._expected)
        return Found(dict(zip(workers, each, strict=True)), through)

    def _take(self, server: Server, found: Found) -> None:
        self._found[server] = found
        server.replicas, server.behind = found.replicas, found.behind
        for facts in found.facts.values():
            for remark in facts.remarks:
                if remark not in self._told:
                    self._told.add(remark)
                    self._log(remark)
        if found.behind:
            self._log(f"{server.url} routes to {len(found.behind)} servers")
