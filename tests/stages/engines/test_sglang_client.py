"""The client against real HTTP servers that misbehave: repetition, spreading, moving away from the dead."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.client import Answer, LostError
from draftsmith.stages.engines.sglang.health import Server, State, pause
from draftsmith.stages.engines.sglang.pool import ServerPool
from tests.stages.engines.http_server import HttpServer, Refusal, answer, is_probe, serving


def payload(token: int = 5, new: int = 3) -> dict[str, Any]:
    return {"input_ids": [1, token], "sampling_params": {"temperature": 0, "max_new_tokens": new}}


def with_pool(
    servers: list[HttpServer],
    body: Callable[[ServerPool], Awaitable[Any]],
    *,
    concurrency: int = 4,
    retries: int = 3,
    timeout_s: float = 30.0,
    **options: Any,
) -> tuple[Any, list[str]]:
    """Run `body` with a pool of these servers; its result and what was logged."""
    logs: list[str] = []

    async def run() -> Any:
        async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5), trust_env=False) as client:
            pool = ServerPool(
                client,
                [Server(server.url) for server in servers],
                concurrency=concurrency,
                retries=retries,
                timeout_s=timeout_s,
                log=logs.append,
                backoff_s=0.02,
                **options,
            )
            try:
                return await body(pool)
            finally:
                await pool.close()

    return asyncio.run(run()), logs


async def ask_many(pool: ServerPool, count: int) -> list[Answer]:
    return await asyncio.gather(*(pool.ask(f"r{i}", payload(i)) for i in range(count)))


def ids(answers: list[Answer]) -> list[list[int]]:
    return [found.body["output_ids"] for found in answers]


EXPECTED = [[i + 1, i + 2, i + 3] for i in range(40)]


def test_answers_come_back_and_concurrency_is_bounded_and_used() -> None:
    gate = threading.Barrier(5)  # nothing is answered before five requests are there

    def together(p: dict[str, Any]) -> dict[str, Any]:
        gate.wait(30)
        return answer(p, delay_s=0.02)

    with serving(together) as server:
        found, _ = with_pool([server], lambda pool: ask_many(pool, 40), concurrency=5)
        assert ids(found) == EXPECTED
        assert server.most_at_once == 5
        assert server.count("/generate") == 40
        assert all(a.seconds > 0.02 and math.isnan(a.first_token_seconds) for a in found)


def test_load_is_spread_over_servers_by_what_they_have_in_flight() -> None:
    enough = threading.Event()

    def slowly(p: dict[str, Any]) -> dict[str, Any]:
        assert enough.wait(30)
        return answer(p)

    def fast_one(p: dict[str, Any]) -> dict[str, Any]:
        if fast.count("/generate") > 30:
            enough.set()
        return answer(p)

    with serving(slowly) as slow, serving(fast_one) as fast:
        found, _ = with_pool([slow, fast], lambda pool: ask_many(pool, 40), concurrency=2)
        assert ids(found) == EXPECTED
        assert fast.count("/generate") > 3 * slow.count("/generate") > 0
        assert max(slow.most_at_once, fast.most_at_once) == 2


def test_a_total_bound_counts_all_servers() -> None:
    with serving(lambda p: answer(p, delay_s=0.02)) as a, serving(lambda p: answer(p, delay_s=0.02)) as b:

        async def one_at_a_time(pool: ServerPool) -> list[Answer]:
            pool.set_concurrency(1)
            assert pool.places == 1
            return await ask_many(pool, 10)

        found, _ = with_pool([a, b], one_at_a_time)
        assert ids(found) == EXPECTED[:10]
        assert (a.most_at_once, b.most_at_once) in {(1, 0), (1, 1), (0, 1)}


@pytest.mark.parametrize("trouble", [500, 502, None], ids=lambda t: str(t or "closed connection"))
def test_what_was_lost_is_asked_again(trouble: int | None) -> None:
    counter = itertools.count()

    def sometimes(p: dict[str, Any]) -> dict[str, Any] | None:
        if not is_probe(p) and next(counter) % 3 == 0:
            if trouble is None:
                return None
            raise Refusal(trouble)
        return answer(p)

    with serving(sometimes) as server:
        found, logs = with_pool([server], lambda pool: ask_many(pool, 20), retries=12)
        assert ids(found) == EXPECTED[:20]
        assert server.count("/generate") > 25
        assert not logs  # the server was alive all the time


def test_a_request_that_is_lost_too_often_is_one_clear_error_that_another_run_may_cure() -> None:
    def refuses(p: dict[str, Any]) -> dict[str, Any]:
        if is_probe(p):
            return answer(p)
        raise Refusal(500, "scheduler\nhit an exception")

    with serving(refuses) as server:
        with pytest.raises(RetryableError, match=r"request r0: failed 3 times.*status 500.*scheduler") as caught:
            with_pool([server], lambda pool: pool.ask("r0", payload()), retries=2)
        assert "\n" not in str(caught.value)
        assert sum(not is_probe(p) for path, p in server.asked if path == "/generate") == 3


def test_a_refused_request_is_not_repeated() -> None:
    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(400, "input too long")

    with serving(refuses) as server:
        with pytest.raises(
            DraftsmithError, match=r"request r0: .*refuses it with status 400.*input too long"
        ) as caught:
            with_pool([server], lambda pool: pool.ask("r0", payload()))
        assert not isinstance(caught.value, RetryableError)
        assert server.count("/generate") == 1


@pytest.mark.parametrize("status", [404, 405, 410])
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_gateway_does_not_route_to_a_server_any_more_is_asked_elsewhere(status: int, stream: bool) -> None:
    def gone(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(status, "no route")

    async def run(pool: ServerPool) -> list[Answer]:
        found = await ask_many(pool, 12)
        async with asyncio.timeout(30):
            while pool.servers[0].state is not State.DOWN:
                await asyncio.sleep(0.01)
        return found

    with serving(gone, health_generate=gone) as drained, serving(answer) as healthy:
        found, logs = with_pool([drained, healthy], run, retries=1, stream=stream)
        assert ids(found) == EXPECTED[:12]
        assert 1 <= sum("rid" in p for _, p in drained.asked) <= 4
    assert any(f"{drained.url} is lost: answered with status {status}" in line for line in logs)


@pytest.mark.parametrize(
    "body",
    [
        {"output_ids": [1], "meta_info": {"finish_reason": {"type": "abort", "message": "shutting down"}}},
        {"output_ids": [1], "meta_info": {"finish_reason": None}},
        {"text": "no meta_info"},
    ],
    ids=["abort", "no end", "no meta_info"],
)
def test_an_answer_without_an_end_is_asked_again(body: dict[str, Any]) -> None:
    counter = itertools.count()

    def first_wrong(p: dict[str, Any]) -> dict[str, Any]:
        return answer(p) if is_probe(p) or next(counter) else body

    with serving(first_wrong) as server:
        found, _ = with_pool([server], lambda pool: pool.ask("r", payload()))
        assert found.body["output_ids"] == [6, 7, 8]


def test_a_hanging_request_is_aborted_and_asked_again() -> None:
    counter, release = itertools.count(), threading.Event()

    def first_hangs(p: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(p) and next(counter) == 0:
            release.wait(20)
        return answer(p)

    with serving(first_hangs, abort_request=lambda _: {}) as server:
        found, _ = with_pool([server], lambda pool: pool.ask("r", payload()), timeout_s=0.5)
        release.set()
        assert found.body["output_ids"] == [6, 7, 8]
        hung = next(p["rid"] for path, p in server.asked if path == "/generate")
        assert ("/abort_request", {"rid": hung}) in server.asked


def test_requests_of_a_server_that_dies_move_to_the_others_at_once() -> None:
    stuck = threading.Event()

    def hangs(p: dict[str, Any]) -> dict[str, Any] | None:
        if p["input_ids"] == [1, 0]:
            return None  # one connection breaks; the probes that follow find nobody; the others would hang for ever
        stuck.wait(20)
        return None

    with serving(hangs) as dying, serving(answer) as healthy:

        async def kill_then_ask(pool: ServerPool) -> list[Answer]:
            asking = asyncio.gather(*(pool.ask(f"r{i}", payload(i)) for i in range(1, 9)))
            while dying.count("/generate") < 4:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(dying.stop)
            first = await pool.ask("r0", payload(0))
            pool.health.suspect(pool.servers[0], LostError("connection lost"))  # as a request on it would
            return [first, *await asyncio.wait_for(asking, 20)]

        found, logs = with_pool([dying, healthy], kill_then_ask)
        stuck.set()
        assert ids(found) == EXPECTED[:9]
        assert any(f"{dying.url} is lost" in line for line in logs)


def test_no_server_left_is_one_clear_error_that_names_them() -> None:
    with serving(answer) as a, serving(answer) as b:
        a.stop()
        b.stop()
        with pytest.raises(RetryableError, match=rf"no SGLang server is left: {a.url} .*{b.url}") as caught:
            with_pool([a, b], lambda pool: ask_many(pool, 6), retries=6)
        assert "\n" not in str(caught.value)


def test_a_revived_server_gets_the_waiting_requests_under_its_new_address() -> None:
    with serving(answer) as dead, serving(answer) as reborn:
        dead.stop()

        async def revive(server: Server) -> bool:
            server.url = reborn.url
            return True

        found, _ = with_pool([dead], lambda pool: ask_many(pool, 8), revive=revive)
        assert ids(found) == EXPECTED[:8]


def test_a_revival_that_fails_tells_the_waiting_requests() -> None:
    with serving(answer) as dead:
        dead.stop()

        async def revive(_: Server) -> bool:
            raise DraftsmithError("another model came up")

        with pytest.raises(RetryableError, match=r"no SGLang server is left: .*another model came up"):
            with_pool([dead], lambda pool: ask_many(pool, 8), revive=revive)


def test_cancelled_requests_are_aborted_on_the_server() -> None:
    release = threading.Event()

    def hangs(p: dict[str, Any]) -> dict[str, Any]:
        release.wait(20)
        return answer(p)

    with serving(hangs, abort_request=lambda _: {}) as server:

        async def cancel(pool: ServerPool) -> None:
            tasks = [asyncio.create_task(pool.ask(f"r{i}", payload(i))) for i in range(6)]
            while server.count("/generate") < 4:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with_pool([server], cancel)
        release.set()
        aborted = {p["rid"] for path, p in server.asked if path == "/abort_request"}
        assert aborted == {p["rid"] for path, p in server.asked if path == "/generate"}
        assert len(aborted) == 4


def test_streaming_measures_the_first_token() -> None:
    with serving(answer) as server:
        found, _ = with_pool([server], lambda pool: pool.ask("r", payload()), stream=True)
        assert found.body["output_ids"] == [6, 7, 8]
        assert 0 < found.first_token_seconds <= found.seconds
        assert server.asked[0][1]["sampling_params"]["stream_interval"] > 10**6


def test_lost_requests_do_not_return_together() -> None:
    pauses = [[pause(tries, 0.5) for _ in range(50)] for tries in (1, 2, 3, 20)]
    for typical, drawn in zip((0.5, 1.0, 2.0, 30.0), pauses, strict=True):
        assert typical / 2 <= min(drawn) < max(drawn) <= typical * 1.5
        assert len(set(drawn)) > 40


def test_a_pause_after_any_number_of_tries_is_one() -> None:
    assert 30 <= pause(2000, 5.0, 60.0) <= 90
