"""The engine that generates on SGLang servers: requests go out over HTTP, completions come back as they finish."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import GREEDY_ONLY, SGLangEngineConfig
from draftsmith.stages.engines.sglang.client import Answer, RefusedRequestError
from draftsmith.stages.engines.sglang.pool import DeadlyRequestError, LostTooOftenError, ServerPool, TimedOutError
from draftsmith.stages.engines.sglang.records import BadAnswerError, completion_of, generate_payload

if TYPE_CHECKING:
    from draftsmith.stages.engines.sglang.fleet import Fleet
    from draftsmith.stages.engines.sglang.handshake import Expected

T = TypeVar("T")
_CHECK_S = 0.5  # between two looks at whether the stage was asked to stop, while it waits for servers
_MOST_UNANSWERED = 20  # requests; then the cause is not the prompt
# Others may fare better.
_OF_ONE_REQUEST = (RefusedRequestError, TimedOutError, LostTooOftenError, DeadlyRequestError, BadAnswerError)


class UnansweredError(DraftsmithError):
    """Some requests have no answer, and would have none the next time."""


def _go_on() -> None:
    """Nobody asks to stop."""


class LoopThread:
    """An event loop in a thread of its own, for a caller that is not asynchronous."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], check: Callable[[], None] = _go_on) -> T:
        """Run to its end; what ends the wait (Ctrl-C, or `check`, asked twice a second) cancels it."""
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

    def call(self, function: Callable[[], None]) -> None:
        """Call a function in the loop, and wait for it."""

        async def called() -> None:
            function()

        self.run(called())

    def close(self) -> None:
        """End every task, then the thread."""

        async def cancel_all() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SGLangEngine:
    """Fulfils `draftsmith.stages.engines.base.Engine`; made by `open_sglang`.

    `first_token_seconds` of completions is NaN unless the engine was opened with `measure_first_token`.
    """

    def __init__(
        self,
        loop: LoopThread,
        fleet: Fleet,
        pool: ServerPool,
        expected: Expected,
        log: Callable[[str], None],
        check: Callable[[], None] = _go_on,
    ):
        self._loop, self._fleet, self._pool, self._expected = loop, fleet, pool, expected
        self._log, self._check = log, check
        self.records_trace = fleet.records_trace
        self.batch_decides = False  # it does, but a server batches what it has at the moment
        self.name = fleet.name

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Yield answers in the order in which they finish. Closing the iterator aborts what is in flight.

        A request that fails does not end the others: when all are through, one error names those without an answer.
        After `_MOST_UNANSWERED` of them no new ones are sent. Where no request can succeed (no server is left, the API
        key is refused), completions that have finished come first, then its error.
        """
        pending: dict[Future[Completion], str] = {}
        finished: queue.SimpleQueue[Future[Completion]] = queue.SimpleQueue()
        queued = iter(requests)
        unanswered: dict[str, DraftsmithError] = {}
        try:
            while True:
                # Twice as many as can be in flight, so that servers stay full while the caller writes.
                while (
                    sum(not isinstance(error, DeadlyRequestError) for error in unanswered.values()) < _MOST_UNANSWERED
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
                elif isinstance(error, _OF_ONE_REQUEST):
                    unanswered[name] = error
                    self._log(f"left without an answer: {error}")
                else:
                    yield from _completions(finished)
                    raise error
        finally:
            for future in pending:
                future.cancel()
        if unanswered:
            self._loop.call(lambda: self._pool.deaths.forget(unanswered))  # named once: whoever asks again may
            raise _without_answers(unanswered)

    async def _answer(self, request: Request) -> Completion:
        if self._fleet.greedy_only and not request.sampling.greedy:
            raise DraftsmithError(f"sampling.temperature: {GREEDY_ONLY}")
        payload = generate_payload(request, self._expected.target.eos_ids, self.records_trace)
        return await self._pool.ask(request.request_id, payload, lambda answer: self._completion(request, answer))

    def _completion(self, request: Request, answer: Answer) -> Completion:
        # A server that was full may have read an answer again, which makes a token without a verify step. Its tokens
        # are right; it is taken without its steps, which mining replays.
        retracted = int(answer.body.get("meta_info", {}).get("num_retractions") or 0)
        return completion_of(
            request,
            answer.body,
            eos_ids=self._expected.target.eos_ids,
            vocab_size=self._expected.target.vocab_size,
            records_of=self._expected.drafter_digest if self.records_trace and not retracted else None,
            seconds=answer.seconds,
            first_token_seconds=answer.first_token_seconds,
        )

    @property
    def was_full(self) -> bool:
        """Return whether a server refused requests for being full, so that they waited here."""
        return any(server.was_full for server in self._pool.servers)

    @property
    def repeated(self) -> int:
        """Return how many attempts were lost so far, or got an answer that was not what was asked for."""
        return self._pool.repeated

    def set_concurrency(self, total: int | None) -> None:
        """Bound the requests in flight on all servers together; None: `engine.concurrency` a server again."""
        self._loop.call(lambda: self._pool.set_concurrency(total))

    def flush_cache(self) -> None:
        """Forget cached prefixes on all servers, when they are idle. Raises RetryableError if one stays busy."""
        self._loop.run(self._fleet.flush_cache(), self._check)


def _without_answers(errors: dict[str, DraftsmithError]) -> DraftsmithError:
    """Return one error for the requests that failed, by their names."""
    names, first = list(errors), next(iter(errors.values()))
    many = f"{len(names)} requests ({', '.join(names)}) have" if len(names) > 1 else "one request has"
    stopped = "; so many that no new ones were sent" if len(names) >= _MOST_UNANSWERED else ""
    kind = RetryableError if all(isinstance(error, RetryableError) for error in errors.values()) else UnansweredError
    return kind(
        f"engine: {many} no answer{stopped}: {first}; a rollout keeps all other answers, and the same command asks "
        "only for what is missing: mend the cause, or take these prompts (named by prompt_id of prompts.parquet, and "
        "sample) out of prompts.sources, with which all answers are made again"
    )


def _completions(finished: queue.SimpleQueue[Future[Completion]]) -> Iterator[Completion]:
    """Yield those that have finished without an error."""
    with suppress(queue.Empty):
        while True:
            future = finished.get_nowait()
            if not future.cancelled() and future.exception() is None:
                yield future.result()


@contextmanager
def open_sglang(
    config: SGLangEngineConfig,
    *,
    target_folder: Path,
    drafter_folder: Path | None,
    drafting: DraftingConfig,
    longest: int,
    work: Path,
    log: Callable[[str], None],
    measure_first_token: bool = False,
    check: Callable[[], None] = _go_on,
) -> Iterator[SGLangEngine]:
    """Open servers that pass the handshake, started here if the config says so and stopped on exit.

    longest: positions of the longest request. work: launched servers' logs go to its folder `servers`. check: called
    while it waits for servers; what it raises ends the wait.
    Raises DraftsmithError for a config, server or drafter that does not fit, RetryableError if no server answers.
    """
    from draftsmith.stages.engines.sglang.fleet import open_fleet
    from draftsmith.stages.engines.sglang.handshake import Expected

    expected = Expected.of(
        config,
        target_folder=target_folder,
        drafter_folder=drafter_folder,
        drafting=drafting,
        longest=longest,
        stream=measure_first_token,
    )
    # Servers are started from this thread, which therefore must outlive them: see ServerProcess.
    loop = LoopThread()
    try:
        fleet = open_fleet(config, expected, work / "servers", log)
        try:
            pool = loop.run(fleet.start(), check)
            yield SGLangEngine(loop, fleet, pool, expected, log, check)
        finally:
            loop.run(fleet.stop())
    finally:
        loop.close()
