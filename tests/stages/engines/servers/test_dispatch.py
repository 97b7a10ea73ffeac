"""Requests to real HTTP servers that misbehave: distributed, sent again elsewhere, moved away from a dead server."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.servers import dispatch
from draftsmith.stages.engines.servers.api import BadAnswerError
from draftsmith.stages.engines.servers.dispatch import (
    DeathLog,
    LostTooOftenError,
    PoisonRequestError,
    Server,
    ServerPool,
    TimedOutError,
)
from draftsmith.stages.engines.servers.http import RequestLostError, ServerAnswer, ServerFullError, check_status
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang import api
from tests.stages.engines.http_server import HttpServer, Refusal, Reply, answer, is_probe, serving
from tests.stages.engines.stand_ins import refusing

EXPECTED = [[i + 1, i + 2, i + 3] for i in range(40)]


def payload(token: int = 5, new: int = 3) -> dict[str, Any]:
    return {"input_ids": [1, token], "sampling_params": {"temperature": 0, "max_new_tokens": new}}


def completion(found: ServerAnswer) -> Completion:
    return Completion(Request("r", [1], 3), found.body["output_ids"], "length")


def with_pool(
    servers: list[HttpServer],
    body: Callable[[ServerPool], Awaitable[Any]],
    *,
    concurrency: int = 4,
    timeout_s: float = 30.0,
    deaths: Path | None = None,
    **fields: Any,
) -> tuple[Any, list[str]]:
    """Run `body` with a pool of these servers. Returns its result and the log. fields: of each `Server`."""
    logs: list[str] = []
    config = SGLangEngineConfig(kind="sglang", urls=("http://x",), concurrency=concurrency, request_timeout_s=timeout_s)

    async def run(folder: str) -> Any:
        async with httpx.AsyncClient(timeout=httpx.Timeout(None, connect=5), trust_env=False) as http:
            pool = ServerPool(
                api.SGLangApi(config, cast("ServerRequirements", None), logs.append),  # a pool reads none
                http,
                [Server(server.url, **fields) for server in servers],
                config,
                DeathLog(deaths or Path(folder) / "deaths.json"),
                logs.append,
            )
            async with asyncio.timeout(60):
                return await body(pool)

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(folder)), logs


async def ask(pool: ServerPool, number: int = 5) -> Completion:
    return await pool.send(f"r{number}", payload(number), completion)


async def ask_many(pool: ServerPool, count: int) -> list[list[int]]:
    return [each.response_ids for each in await asyncio.gather(*(ask(pool, i) for i in range(count)))]


def failing(times: int, error: Refusal | None, then: Reply = answer) -> Reply:
    """Return a reply that fails `times` times; without an error the connection is closed."""
    left = itertools.count()

    def generate(asked: dict[str, Any]) -> dict[str, Any] | str | None:
        if not is_probe(asked) and next(left) < times:
            if error is not None:
                raise error
            return None
        return then(asked)

    return generate


# ---- distribution


def test_load_is_distributed_by_requests_in_flight() -> None:
    enough = threading.Event()

    def slowly(asked: dict[str, Any]) -> dict[str, Any]:
        assert enough.wait(30)
        return answer(asked)

    def fast_one(asked: dict[str, Any]) -> dict[str, Any]:
        if fast.count("/generate") > 30:
            enough.set()
        return answer(asked)

    with serving(slowly) as slow, serving(fast_one) as fast:
        found, _ = with_pool([slow, fast], lambda pool: ask_many(pool, 40), concurrency=2)
        assert found == EXPECTED
        assert fast.count("/generate") > 3 * slow.count("/generate") > 0
        assert max(slow.most_at_once, fast.most_at_once) == 2


# ---- retries


@pytest.mark.parametrize("error", [Refusal(500), None], ids=["500", "closed connection"])
def test_lost_requests_are_sent_again_and_counted(error: Refusal | None) -> None:
    with serving(failing(4, error), health_generate=lambda _: {}) as server:

        async def run(pool: ServerPool) -> Any:
            found = await ask_many(pool, 20)
            return found, pool.retries

        (found, repeated), logs = with_pool([server], run)
        assert (found, repeated) == (EXPECTED[:20], 4)
    assert not logs  # the server was alive all the time


@pytest.mark.parametrize(
    "body",
    [
        {"output_ids": [1], "meta_info": {"finish_reason": {"type": "abort", "message": "shutting down"}}},
        {"output_ids": [1], "meta_info": {"finish_reason": None}},
        {"text": "no meta_info"},
    ],
    ids=["abort", "no end", "no meta_info"],
)
def test_after_an_answer_without_an_end_the_request_is_sent_again(body: dict[str, Any]) -> None:
    counter = itertools.count()
    with serving(lambda p: answer(p) if is_probe(p) or next(counter) else body) as server:
        found, _ = with_pool([server], ask)
        assert found.response_ids == [6, 7, 8]


def test_repeated_bad_answers_are_an_error() -> None:
    def read(_: ServerAnswer) -> Completion:
        raise BadAnswerError("no use")

    with serving(answer) as server:
        with pytest.raises(BadAnswerError):
            with_pool([server], lambda pool: pool.send("r0", payload(), read))
        assert server.count("/generate") == dispatch._TRIES[BadAnswerError]


# ---- servers that are full


def with_room_for(number: int, status: int, text: str, answers: Reply) -> Reply:
    """Return a reply that refuses more than `number` concurrent requests."""
    room = threading.Semaphore(number)

    def generate(asked: dict[str, Any]) -> dict[str, Any] | str | None:
        if not room.acquire(blocking=False):
            raise Refusal(status, text)
        try:
            return answers(asked)
        finally:
            room.release()

    return generate


@pytest.mark.parametrize(("status", "text"), [(429, "later"), (503, "The request queue is full.")])
def test_requests_wait_for_a_full_server_without_using_an_attempt(
    status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._TRIES, RequestLostError, 1)
    with serving(with_room_for(2, status, text, lambda asked: answer(asked, delay_s=0.05))) as server:

        async def run(pool: ServerPool) -> Any:
            assert not pool.servers[0].was_full
            found = await ask_many(pool, 20)
            return found, pool.retries, pool.servers[0].was_full

        (found, repeated, was_full), logs = with_pool([server], run, concurrency=8)
        assert (found, repeated, was_full) == (EXPECTED[:20], 0, True)
        assert not any(is_probe(asked) for _, asked in server.asked)
    assert len(logs) == 1 and server.url in logs[0]


def test_a_server_that_stays_full_is_a_retryable_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FULL_LIMIT_S", 0.2)
    with serving(refusing(429)) as server, pytest.raises(LostTooOftenError):
        with_pool([server], ask)


@pytest.mark.parametrize(
    ("status", "text", "header", "wait_s"),
    [
        (429, "", None, 0),
        (429, "", "7", 7),
        (429, "", "soon", 0),
        (503, "The request queue is full.", None, 0),
        (503, "Request waiting timeout reached.", None, 0),
        (503, "The request is aborted by a higher priority request.", None, 0),
        (503, "come back", "5", 5),
        (503, "Request running timeout reached.", None, None),
        (503, "no healthy upstream", None, None),
        (500, "", None, None),
        (408, "", None, None),
    ],
)
def test_which_refusals_mean_that_a_server_is_full(
    status: int, text: str, header: str | None, wait_s: float | None
) -> None:
    with pytest.raises(RequestLostError) as caught:
        check_status("r", "http://a", status, text, header)
    if wait_s is None:
        assert not isinstance(caught.value, ServerFullError)
    else:
        assert isinstance(caught.value, ServerFullError) and caught.value.wait_s == wait_s


# ---- servers that die


def test_requests_of_a_dead_server_move_to_the_others_immediately() -> None:
    stuck = threading.Event()

    def hangs(asked: dict[str, Any]) -> None:
        if asked["input_ids"] != [1, 0]:
            stuck.wait(20)  # one connection breaks; the others would hang for ever

    with serving(hangs) as dying, serving(answer) as healthy:

        async def kill_then_ask(pool: ServerPool) -> Any:
            asking = [asyncio.create_task(ask(pool, i)) for i in range(1, 9)]
            while dying.count("/generate") < 3:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(dying.stop)
            others = {f"of another rollout {i}" for i in range(6)}  # the next request goes to the one that died
            pool.servers[1].requests |= others
            asking.insert(0, asyncio.create_task(ask(pool, 0)))
            await asyncio.sleep(0.05)
            pool.servers[1].requests -= others
            return [each.response_ids for each in await asyncio.gather(*asking)]

        found, logs = with_pool([dying, healthy], kill_then_ask, concurrency=6)
        stuck.set()
    assert found == EXPECTED[:9]
    assert any(f"{dying.url} is lost" in line for line in logs)


@pytest.mark.parametrize("status", [503, 500])
def test_a_server_whose_probes_fail_for_a_while_is_not_lost(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is longer if it is up and computes nothing."""
    monkeypatch.setattr(dispatch, "_FAILING_LIMIT_S", 30.0 if status == 500 else 0.0)
    monkeypatch.setattr(dispatch, "_STALLED_LIMIT_S", 30.0)
    silent = iter([True, True])

    def at_first(_: dict[str, Any]) -> dict[str, Any]:
        if next(silent, False):
            raise Refusal(status)
        return {}

    with serving(failing(1, None), health_generate=at_first) as server:
        found, logs = with_pool([server], lambda pool: ask_many(pool, 2), concurrency=1)
    assert found == EXPECTED[:2] and not logs


def test_a_gateway_without_the_endpoint_is_probed_by_a_generation() -> None:
    with serving(failing(1, Refusal(500)), health_generate=refusing(404)) as server:
        with_pool([server], ask)
        assert [path for path, _ in server.asked] == ["/generate", "/health_generate", "/generate", "/generate"]


def test_a_silent_server_is_found_long_before_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PROBE_AFTER_S", 0.2)
    monkeypatch.setattr(api, "_HEALTH_TIMEOUT_S", 0.3)
    over = threading.Event()

    def dark(_: dict[str, Any]) -> None:
        over.wait(60)

    with serving(dark, health_generate=dark) as gone, serving(answer) as good:
        found, logs = with_pool([gone, good], lambda pool: ask_many(pool, 8), concurrency=2, timeout_s=1800)
        over.set()
    assert found == EXPECTED[:8]
    assert any(f"{gone.url} is lost" in line for line in logs)


def test_a_router_is_healthy_while_it_and_one_of_its_servers_are() -> None:
    workers: Reply = lambda _: {"workers": []}  # noqa: E731
    with (
        serving(failing(1, Refusal(500)), workers=workers) as front,
        serving(answer, health_generate=lambda _: {}) as good,
        serving(answer) as gone,
    ):
        gone.stop()
        found, _ = with_pool([front], lambda pool: ask_many(pool, 4), workers=(gone.url, good.url))
        assert found == EXPECTED[:4]
        front.replies["/generate"] = refusing(500)
        with pytest.raises(RetryableError, match="no SGLang server is left"):
            with_pool([front], lambda pool: ask_many(pool, 4), workers=(gone.url,))
        front.stop()
        with pytest.raises(RetryableError, match="no SGLang server is left"):
            with_pool([front], lambda pool: ask_many(pool, 4), workers=(good.url,))


# ---- requests that servers died with


@contextmanager
def mortal(count: int, kills: Callable[[int], bool]) -> Iterator[list[HttpServer]]:
    """Run servers that die with some requests, and lose the others in flight."""
    servers = [HttpServer({}) for _ in range(count)]

    def generate_of(server: HttpServer) -> Reply:
        def generate(asked: dict[str, Any]) -> dict[str, Any] | None:
            if kills(asked["input_ids"][-1]):
                server.stop()
            done = answer(asked, delay_s=0.03)
            return done if server.running else None

        return generate

    def health_of(server: HttpServer) -> Reply:
        return lambda _: {} if server.running else None  # also on connections that are open

    with ExitStack() as stack:
        for server in servers:
            server.replies = {"/generate": generate_of(server), "/health_generate": health_of(server)}
            server.start()
            stack.callback(server.stop)
        yield servers


async def errors_of(pool: ServerPool, count: int = 60) -> dict[int, BaseException]:
    """Return the answers by the number of their request."""
    each = await asyncio.gather(*(ask(pool, i) for i in range(count)), return_exceptions=True)
    return {number: found for number, found in enumerate(each) if isinstance(found, BaseException)}


def test_a_request_in_flight_at_two_deaths_is_reported_and_the_others_are_answered() -> None:
    with mortal(4, {5}.__contains__) as running:
        errors, logs = with_pool(running, errors_of, concurrency=2)
        assert sum(server.running for server in running) == 2
    assert 5 in errors and len(errors) <= 2  # one more may have been in flight both times
    assert all(isinstance(error, PoisonRequestError) for error in errors.values())
    assert not any(isinstance(error, RetryableError) for error in errors.values())
    assert "request r5" in str(errors[5])
    assert sum("is lost" in line for line in logs) == 2


def test_deaths_are_counted_across_retries_of_the_stage(tmp_path: Path) -> None:
    """With a single server none is left after each death."""
    file = tmp_path / "servers" / "deaths.json"
    for attempt in range(2):
        with mortal(1, {5}.__contains__) as running:
            errors, _ = with_pool(running, errors_of, concurrency=1, deaths=file)
        kinds = {type(error) for number, error in errors.items() if number > 5}
        assert kinds == {RetryableError}
        assert type(errors[5]) is (PoisonRequestError if attempt else RetryableError)
    with mortal(1, {5}.__contains__) as running:
        errors, _ = with_pool(running, errors_of, deaths=file)
        assert running[0].running
    assert set(errors) == {5} and isinstance(errors[5], PoisonRequestError)
    DeathLog(file).forget(["r5"])
    assert not DeathLog(file).servers("r5")


# ---- time limits


def hanging(release: threading.Event, times: int = 99) -> Reply:
    left = itertools.count()

    def generate(asked: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(asked) and next(left) < times:
            release.wait(30)
        return answer(asked)

    return generate


@pytest.mark.parametrize("times", [1, 99])
def test_a_request_that_takes_too_long_is_aborted_and_sent_once_more(times: int) -> None:
    release = threading.Event()
    with serving(hanging(release, times), health_generate=lambda _: {}, abort_request=lambda _: {}) as server:
        if times == 1:
            assert with_pool([server], ask, timeout_s=0.3)[0].response_ids == [6, 7, 8]
        else:
            with pytest.raises(TimedOutError, match=r"request r5: .*engine\.request_timeout_s") as caught:
                with_pool([server], ask, timeout_s=0.3)
            assert isinstance(caught.value, DraftsmithError) and not isinstance(caught.value, RetryableError)
        release.set()
        assert server.count("/generate") == 2
        hung = next(asked["rid"] for path, asked in server.asked if path == "/generate")
        assert ("/abort_request", {"rid": hung}) in server.asked


def test_a_server_that_does_not_compute_loses_its_request_to_another() -> None:
    release = threading.Event()
    with serving(hanging(release), health_generate=refusing(503)) as hangs, serving(answer) as good:
        found, _ = with_pool([hangs, good], lambda pool: ask_many(pool, 2), timeout_s=0.3)
        release.set()
    assert found == EXPECTED[:2]
