"""Servers that are full: requests wait for them, and nothing is taken for death or counted as a failure."""

from __future__ import annotations

import asyncio
import threading
import time
from email.utils import formatdate
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang import client
from draftsmith.stages.engines.sglang import pool as pooling
from draftsmith.stages.engines.sglang.client import BusyError, LostError, UnreachedError, check_status, generate
from draftsmith.stages.engines.sglang.pool import LostTooOftenError, ServerPool, TimedOutError
from tests.stages.engines.http_server import Refusal, Reply, answer, is_probe, serving
from tests.stages.engines.test_sglang_client import EXPECTED, ask_many, ids, payload, with_pool


def with_room_for(number: int, status: int, answers: Reply = answer) -> Reply:
    """Refuses what is more at once."""
    room = threading.Semaphore(number)

    def generate(asked: dict[str, Any]) -> dict[str, Any] | None:
        if not room.acquire(blocking=False):
            raise Refusal(status, "The request queue is full.")
        try:
            return answers(asked)
        finally:
            room.release()

    return generate


@pytest.mark.parametrize("status", [429, 503])
def test_requests_wait_for_a_full_server_and_no_refusal_is_a_failure(status: int) -> None:
    with serving(with_room_for(2, status, lambda p: answer(p, delay_s=0.05))) as server:
        found, logs = with_pool([server], lambda pool: ask_many(pool, 20), concurrency=8, retries=0)
        assert ids(found) == EXPECTED[:20]
        assert not any(is_probe(p) for _, p in server.asked)
    (told,) = logs
    assert told.startswith(f"SGLang server {server.url} is full: it answered with status {status}")


def test_a_server_whose_answer_was_bad_is_not_asked_because_another_is_full() -> None:
    left = [3]

    def full_at_first(p: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise Refusal(429)
        return answer(p)

    with serving(answer) as bad, serving(full_at_first) as good:
        found, _ = with_pool([bad, good], lambda pool: pool.ask("r0", payload(0), avoid=bad.url), retries=0)
        assert found.body["output_ids"] == EXPECTED[0]
        assert (bad.count("/generate"), good.count("/generate")) == (0, 4)


def test_an_abort_for_a_full_queue_is_a_refusal_too() -> None:
    full = {"output_ids": [], "meta_info": {"finish_reason": {"type": "abort", "status_code": 503, "message": "full"}}}
    left = [3]

    def at_first(p: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        return full if left[0] >= 0 else answer(p)

    with serving(at_first) as server:
        found, _ = with_pool([server], lambda pool: ask_many(pool, 1), retries=0, stream=True)
        assert ids(found) == EXPECTED[:1]


def test_a_full_server_is_asked_for_what_it_takes() -> None:
    gate = threading.Event()

    def held(p: dict[str, Any]) -> dict[str, Any]:
        assert gate.wait(30)
        return answer(p)

    with serving(with_room_for(3, 503, held)) as server:

        async def run(pool: ServerPool) -> Any:
            asking = asyncio.gather(*(pool.ask(f"r{i}", payload(i)) for i in range(9)))
            while server.count("/generate") < 9:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # many times the first pause
            refused = server.count("/generate")
            gate.set()
            return refused, ids(await asyncio.wait_for(asking, 30))

        (refused, found), _ = with_pool([server], run, concurrency=9)
        assert (refused, found) == (9, EXPECTED[:9])


def test_what_the_server_says_of_later_is_heeded() -> None:
    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(429, "later", Retry_After="240")

    async def run(pool: ServerPool) -> float:
        asking = asyncio.create_task(pool.ask("r0", payload()))
        load = pool.servers[0].load
        while not load.refusals:
            await asyncio.sleep(0.01)
        asking.cancel()
        return load.rests_until - time.monotonic()

    with serving(refuses) as server:
        rest_s, _ = with_pool([server], run)
        assert 200 < rest_s < 241

        async def ask() -> None:
            async with httpx.AsyncClient(trust_env=False) as client:
                await generate(client, server.url, "r0", payload())

        with pytest.raises(BusyError) as caught:
            asyncio.run(ask())
        assert caught.value.wait_s == 240
    for header, least, most in ((formatdate(time.time() + 100, usegmt=True), 90, 101), ("soon", 0, 0), (None, 0, 0)):
        with pytest.raises(BusyError) as caught:
            check_status("r", "http://a", 503, "", header)
        assert least <= caught.value.wait_s <= most


def test_patience_with_a_server_that_answers_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_PATIENCE_S", 0.2)

    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503, "The request queue is full.")

    with (
        serving(refuses, health_generate=lambda _: {}) as server,
        pytest.raises(RetryableError, match=r"request r0: failed 3 times.*status 503.*queue is full"),
    ):
        with_pool([server], lambda pool: pool.ask("r0", payload()), retries=2)


def test_a_server_that_ends_what_runs_too_long_is_not_waited_for() -> None:
    with pytest.raises(LostError) as caught:
        check_status("r", "http://a", 503, "Request running timeout reached.")
    assert not isinstance(caught.value, BusyError)


@pytest.mark.parametrize(
    ("late", "text", "said", "kind"),
    [
        (True, "upstream connect error or disconnect/reset before headers", {}, UnreachedError),
        (False, "upstream connect error or disconnect/reset before headers", {}, BusyError),
        (True, "come back", {"Retry_After": "5"}, BusyError),
        (True, "The request queue is full.", {}, BusyError),
        (True, "Request waiting timeout reached.", {}, BusyError),
        (True, "The request is aborted by a higher priority request.", {}, BusyError),
        (True, "Request running timeout reached.", {}, LostError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_503_long_after_sending_is_of_a_server_that_a_gateway_has_lost(
    late: bool,
    text: str,
    said: dict[str, str],
    kind: type[LostError],
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client, "_AT_ONCE_S", -1.0 if late else 600.0)

    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503, text, **said)

    async def ask() -> None:
        async with httpx.AsyncClient(trust_env=False) as http:
            await generate(http, server.url, "r0", payload(), stream=stream)

    with serving(refuses) as server, pytest.raises(LostError) as caught:
        asyncio.run(ask())
    assert type(caught.value) is kind


def test_a_request_that_a_server_behind_a_gateway_died_with_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not asked for hour after hour, as of a server that is full."""
    monkeypatch.setattr(client, "_AT_ONCE_S", -1.0)

    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503, "no healthy upstream")

    with serving(refuses, health_generate=lambda _: {}) as server:
        with pytest.raises(LostTooOftenError, match=r"request r0: failed 3 times.*no healthy upstream"):
            with_pool([server], lambda pool: pool.ask("r0", payload()), retries=2)
        assert server.count("/generate") == 3


def hanging(release: threading.Event) -> Reply:
    def generate(p: dict[str, Any]) -> dict[str, Any]:
        release.wait(30)
        return answer(p)

    return generate


def test_an_answer_that_takes_too_long_is_asked_for_twice_and_told_as_such() -> None:
    release = threading.Event()
    with serving(hanging(release), health_generate=lambda _: {}) as server:
        with pytest.raises(
            TimedOutError, match=r"request r0: .* in 0\.3 s \(engine\.request_timeout_s\).* up to 700 tokens to write"
        ) as caught:
            with_pool([server], lambda pool: pool.ask("r0", payload(new=700)), timeout_s=0.3, retries=5)
        release.set()
        assert isinstance(caught.value, DraftsmithError) and not isinstance(caught.value, RetryableError)
        assert server.count("/generate") == 2


def test_requests_that_are_not_finished_in_time_get_fewer_beside_them_the_next_time() -> None:
    release, beside = threading.Event(), []
    seen = threading.Lock()

    with serving(answer, health_generate=lambda _: {}) as server:

        async def run(pool: ServerPool) -> Any:
            def first_eight_hang(p: dict[str, Any]) -> dict[str, Any]:
                with seen:
                    beside.append(pool.servers[0].in_flight)
                    hangs = len(beside) <= 8
                if hangs:
                    release.wait(30)
                return answer(p)

            server.replies["/generate"] = first_eight_hang
            return ids(await ask_many(pool, 8))

        found, logs = with_pool([server], run, concurrency=8, timeout_s=2.0)
        release.set()
        assert found == EXPECTED[:8]
    assert len(beside) == 16 and max(beside[8:]) <= 4
    (told,) = logs
    assert "with 8 in flight: it gets 4 at once" in told


def test_a_server_that_does_not_compute_loses_its_request_to_another() -> None:
    release = threading.Event()

    def silent(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503)

    with serving(hanging(release), health_generate=silent) as hangs, serving(answer) as good:
        found, _ = with_pool([hangs, good], lambda pool: ask_many(pool, 2), timeout_s=0.3)
        release.set()
        assert ids(found) == EXPECTED[:2]


def test_nothing_is_sent_while_the_pool_is_held() -> None:
    with serving(answer) as server:

        async def run(pool: ServerPool) -> None:
            pool.hold(True)
            with pytest.raises(pooling.NotSentError):
                await pool.ask("r0", payload())
            pool.hold(False)
            await pool.ask("r1", payload())

        with_pool([server], run)
        assert server.count("/generate") == 1
    assert issubclass(LostTooOftenError, RetryableError)
