"""The engine that generates on servers: requests go out over HTTP, completions come back as they finish."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import GREEDY_ONLY
from draftsmith.stages.engines.servers.api import BadAnswerError
from draftsmith.stages.engines.servers.dispatch import LostTooOftenError, PoisonRequestError, TimedOutError
from draftsmith.stages.engines.servers.fleet import Fleet
from draftsmith.stages.engines.servers.http import RefusedRequestError

T = TypeVar("T")
_CHECK_S = 0.5  # between two calls of `check` while waiting for servers
_MAX_UNANSWERED = 20  # requests; if more fail, the prompt is not the cause
# Errors of one request: others may succeed.
_REQUEST_ERRORS = (RefusedRequestError, TimedOutError, LostTooOftenError, PoisonRequestError, BadAnswerError)


class UnansweredError(DraftsmithError):
    """Some requests have no answer, and would get none the next time."""


def proceed() -> None:
    """Do nothing: never stop."""


class LoopThread:
    """An event loop in its own thread, for a caller that is not asynchronous."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner(loop_factory=asyncio.new_event_loop)
        self._loop = self._runner.get_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server-client", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], check: Callable[[], None] = proceed) -> T:
        """Run a coroutine to its end. Cancel it on Ctrl-C, or if `check`, called twice a second, raises."""
        future = self.submit(work)
        try:
            while not future.done():
                with suppress(TimeoutError):
                    return future.result(_CHECK_S)
                check()
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread, then every task."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._runner.close()


class ServerEngine:
    """Implements `draftsmith.stages.engines.base.Engine`; opened by `open_servers` (`engines/registry.py`).

    `first_token_seconds` of completions is NaN unless the engine was opened with `measure_first_token`.
    """

    def __init__(self, loop: LoopThread, fleet: Fleet, check: Callable[[], None]):
        self._loop, self._fleet, self._pool, self._check = loop, fleet, fleet.pool, check
        self.records_trace = fleet.records_trace
        self.batch_decides = False  # a server batches its current requests
        self.name, self.target_difference = fleet.name, fleet.target_difference

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield answers in the order in which they finish. Closing the iterator aborts what is in flight.

        A request that fails does not end the others: after all of them, one error names those without an answer. After
        `_MAX_UNANSWERED` such requests no new ones are sent. Where no request can succeed (no server is left, the API
        key is refused), finished completions come first, then the error.
        """
        pending: dict[Future[Completion], str] = {}
        finished: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
        queued = iter(requests)
        unanswered: dict[str, DraftsmithError] = {}
        try:
            while True:
                # Twice as many as can be in flight, so that servers stay full while the caller writes.
                while (
                    sum(not isinstance(error, PoisonRequestError) for error in unanswered.values()) < _MAX_UNANSWERED
                    and len(pending) < 2 * self._pool.capacity
                    and (request := next(queued, None)) is not None
                ):
                    future = self._loop.submit(self._answer(request))
                    pending[future] = request.request_id
                    future.add_done_callback(finished.put)
                if not pending:
                    break
                try:
                    done = finished.get(timeout=_CHECK_S)
                except queue.Empty:
                    self._check()
                    continue
                name = pending.pop(done)
                error = done.exception()
                if error is None:
                    yield done.result()
                elif isinstance(error, _REQUEST_ERRORS):
                    unanswered[name] = error
                    self._fleet.log(f"request failed: {error}")
                else:
                    yield from _drain(finished)
                    raise error
        finally:
            for future in pending:
                future.cancel()
        if unanswered:
            self._loop.run(self._pool.forget_deaths(unanswered))  # reported; another run may try again
            raise _unanswered_error(unanswered)

    async def _answer(self, request: Request) -> Completion:
        if self._fleet.greedy_only and not request.sampling.greedy:
            raise DraftsmithError(f"sampling.temperature: {GREEDY_ONLY}")
        api, traced = self._fleet.api, self.records_trace
        payload = api.payload(request, traced=traced)
        return await self._pool.send(
            request.request_id, payload, lambda answer: api.completion(request, answer, traced=traced)
        )

    @property
    def was_full(self) -> bool:
        """Return whether a server refused requests because it was full, so that they waited here."""
        return any(server.was_full for server in self._pool.servers)

    @property
    def retries(self) -> int:
        """Return the number of attempts that were lost so far, or whose answer did not fit the request."""
        return self._pool.retries

    def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: `engine.concurrency` per replica again."""
        self._loop.run(self._pool.set_concurrency(total))

    def flush_cache(self) -> None:
        """Empty the prefix caches of all servers once they are idle. Raises RetryableError if one stays busy."""
        self._loop.run(self._fleet.flush_cache(), self._check)


def _unanswered_error(errors: dict[str, DraftsmithError]) -> DraftsmithError:
    """Return one error that names the failed requests."""
    names, first = list(errors), next(iter(errors.values()))
    many = f"{len(names)} requests ({', '.join(names)}) have" if len(names) > 1 else "one request has"
    stopped = "; so many that no new ones were sent" if len(names) >= _MAX_UNANSWERED else ""
    kind = RetryableError if all(isinstance(error, RetryableError) for error in errors.values()) else UnansweredError
    return kind(
        f"engine: {many} no answer{stopped}. The first: {first} Remove the cause and run the same command: a rollout "
        "keeps all other answers. Or remove these prompts (prompt_id of prompts.parquet, and sample) from "
        "prompts.sources; then all answers are generated again."
    )


def _drain(finished: queue.SimpleQueue[Future[Completion]]) -> Iterator[Completion]:
    """Yield the completions that have finished without an error."""
    with suppress(queue.Empty):
        while True:
            future = finished.get_nowait()
            if not future.cancelled() and future.exception() is None:
                yield future.result()
