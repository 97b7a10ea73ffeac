"""Requests that servers die with: the one that kills is set aside and named, those that were beside it are answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang.pool import ServerPool
from draftsmith.stages.engines.sglang.suspects import Asked, DeadlyRequestError
from tests.stages.engines.http_server import HttpServer, Reply, answer
from tests.stages.engines.test_sglang_client import payload, with_pool

COUNT = 60


@contextmanager
def mortal(count: int, kills: Callable[[int], bool]) -> Iterator[list[HttpServer]]:
    """Servers that die with requests of some numbers, and lose what else they have in flight."""
    servers = [HttpServer({}) for _ in range(count)]

    def generate_of(server: HttpServer) -> Reply:
        def generate(asked: dict[str, Any]) -> dict[str, Any] | None:
            if kills(asked["input_ids"][-1]):
                server.stop()
            done = answer(asked, delay_s=0.03)
            return done if server.running else None

        return generate

    def health_of(server: HttpServer) -> Reply:
        return lambda _: {} if server.running else None

    with ExitStack() as stack:
        for server in servers:
            server.replies = {"/generate": generate_of(server), "/health_generate": health_of(server)}
            server.start()
            stack.callback(server.stop)
        yield servers


async def ask_all(pool: ServerPool) -> dict[int, BaseException]:
    """The errors, by the number of their request."""
    asking = (pool.ask(f"r{i}", payload(i)) for i in range(COUNT))
    each = await asyncio.gather(*asking, return_exceptions=True)
    return {number: found for number, found in enumerate(each) if isinstance(found, BaseException)}


@pytest.mark.parametrize(("servers", "deadly", "left"), [(4, {5}, 1), (8, {5, 9}, 2)])
def test_a_request_that_kills_servers_is_set_aside_and_named_and_all_others_are_answered(
    servers: int, deadly: set[int], left: int
) -> None:
    with mortal(servers, deadly.__contains__) as running:
        errors, _ = with_pool(running, ask_all, retries=8)
        assert sum(server.running for server in running) >= left
    assert set(errors) == deadly
    for number, error in errors.items():
        assert isinstance(error, DeadlyRequestError) and not isinstance(error, RetryableError)
        assert str(error).startswith(f"request r{number}: was in flight when 3 SGLang servers died (http://")


def test_a_request_that_was_only_there_when_servers_died_is_answered() -> None:
    left = [2]

    def kills(number: int) -> bool:
        left[0] -= number == 5
        return number == 5 and left[0] >= 0

    with mortal(4, kills) as running:
        errors, logs = with_pool(running, ask_all, retries=8)
    assert not errors
    assert sum("is lost" in line for line in logs) == 2


def test_where_no_server_is_left_the_error_names_what_they_died_with() -> None:
    with mortal(2, lambda number: number == 5) as running:
        errors, _ = with_pool(running, ask_all, retries=8, concurrency=2)
    assert errors and all(isinstance(error, RetryableError) for error in errors.values())
    assert all("no SGLang server is left" in str(error) for error in errors.values())
    assert any("several died while they had" in str(error) and "r5" in str(error) for error in errors.values())


def died(*counts: int) -> list[Asked]:
    return [Asked(f"r{number}", ["http://a"] * count) for number, count in enumerate(counts)]


def test_a_suspect_is_asked_beside_none_that_a_server_died_with() -> None:
    fresh, once, twice = died(0, 1, 2)
    assert all(fresh.fits(others) for others in ([], died(0), died(2), died(0, 1, 2)))
    assert once.fits(died(0, 1)) and not once.fits(died(0, 2))
    assert twice.fits(died(0, 0)) and not twice.fits(died(0, 1))


def test_a_request_that_two_servers_lost_waits_until_it_is_known_whether_they_died() -> None:
    fresh, once = died(0, 1)
    assert not fresh.waits(0) and not fresh.waits(1) and fresh.waits(2)
    assert not once.waits(0) and once.waits(1)
    once.check()
    with pytest.raises(DraftsmithError, match="request r0: was in flight when 3 SGLang servers died"):
        died(3)[0].check()
