"""Is a server alive? One that computes is not taken for dead, one that went dark is found, what is back is checked."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.sglang import client, health
from draftsmith.stages.engines.sglang import pool as pooling
from draftsmith.stages.engines.sglang.client import LostError
from draftsmith.stages.engines.sglang.health import Server, State
from draftsmith.stages.engines.sglang.pool import ServerPool
from tests.stages.engines.http_server import Refusal, answer, is_probe, serving
from tests.stages.engines.test_sglang_client import EXPECTED, ask_many, ids, payload, with_pool


async def never(_: Server) -> bool:
    raise AssertionError("a server that lives is not started again")


def test_a_server_whose_queue_is_long_is_alive() -> None:
    """No request is answered before the probe has been."""
    probed, first = threading.Event(), [True]

    def generate(p: dict[str, Any]) -> dict[str, Any]:
        if first[0]:
            first[0] = False
            raise Refusal(500)
        assert probed.wait(30)
        return answer(p)

    def well(_: dict[str, Any]) -> dict[str, Any]:
        probed.set()
        return {}

    with serving(generate, health_generate=well) as server:
        found, logs = with_pool([server], lambda pool: ask_many(pool, 8), concurrency=4, revive=never)
        assert ids(found) == EXPECTED[:8]
        assert not any(is_probe(p) for path, p in server.asked if path == "/generate")
    assert not logs


@pytest.mark.parametrize(("status", "times"), [(503, 2 * health._PROBES), (500, health._PROBES - 1)])
def test_a_server_that_is_there_but_computes_nothing_for_a_while_is_waited_for(status: int, times: int) -> None:
    """As is one whose probes fail, if fewer do than of a dead one."""
    left, broken = [times], [True]

    def at_first_silent(_: dict[str, Any]) -> dict[str, Any]:
        left[0] -= 1
        if left[0] >= 0:
            raise Refusal(status)
        return {}

    def generate(p: dict[str, Any]) -> dict[str, Any] | None:
        if broken[0]:
            broken[0] = False
            return None
        return answer(p)

    with serving(generate, health_generate=at_first_silent) as server:
        found, logs = with_pool([server], lambda pool: ask_many(pool, 2), concurrency=1, revive=never)
        assert ids(found) == EXPECTED[:2]
    assert left[0] == -1 and not logs


@pytest.mark.parametrize("no_endpoint", [403, 404, 501])
def test_a_gateway_without_the_endpoint_is_probed_by_a_generation(no_endpoint: int) -> None:
    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(no_endpoint)

    with serving(answer, health_generate=refuses) as server:

        async def run(pool: ServerPool) -> None:
            await pool.health.probe(pool.servers[0])

        with_pool([server], run)
        assert [path for path, _ in server.asked] == ["/health_generate", "/generate"]


def test_a_router_is_well_while_one_of_its_servers_is() -> None:
    def silent(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503, "silent")

    with (
        serving(answer, health_generate=lambda _: {}) as front,
        serving(answer, health_generate=lambda _: {}) as good,
        serving(answer, health_generate=silent) as bad,
    ):

        async def run(pool: ServerPool) -> None:
            router = pool.servers[0]
            router.behind = (good.url, bad.url)
            await pool.health.probe(router)
            router.behind = (bad.url,)
            with pytest.raises(LostError, match="status 503"):
                await pool.health.probe(router)

        with_pool([front], run)


def test_a_router_is_not_lost_because_the_server_that_it_asks_for_its_health_is() -> None:
    def refuses(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(500, "error sending request")

    with (
        serving(broken_once(500), health_generate=refuses) as front,
        serving(answer, health_generate=lambda _: {}) as good,
        serving(answer) as gone,
    ):
        gone.stop()

        async def run(pool: ServerPool) -> Any:
            router = pool.servers[0]
            router.behind = (gone.url, good.url)
            found = await ask_many(pool, 4)
            router.behind = (gone.url,)
            with pytest.raises(LostError, match=r"status 500.*error sending request"):
                await pool.health.probe(router)
            return found

        found, logs = with_pool([front], run, revive=never)
        assert ids(found) == EXPECTED[:4]
    assert not logs


def test_a_server_that_goes_dark_is_found_long_before_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_LOOK_S", 0.1)
    monkeypatch.setattr(health, "_BEAT_S", 0.2)
    monkeypatch.setattr(client, "_HEALTH_TIMEOUT_S", 0.3)
    over = threading.Event()

    def dark(_: dict[str, Any]) -> None:
        over.wait(60)

    with serving(dark, health_generate=dark) as gone, serving(answer) as good:

        async def run(pool: ServerPool) -> Any:
            return await asyncio.wait_for(ask_many(pool, 8), 60)

        found, logs = with_pool([gone, good], run, concurrency=2, timeout_s=1800)
        over.set()
        assert ids(found) == EXPECTED[:8]
    assert any(f"{gone.url} is lost" in line for line in logs)


def test_a_server_that_answers_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_LOOK_S", 0.02)
    with serving(lambda p: answer(p, delay_s=0.1), health_generate=lambda _: {}) as server:
        with_pool([server], lambda pool: ask_many(pool, 8), concurrency=2)
        assert server.count("/health_generate") == 0


class Checks:
    """What is called where a server is to be checked; says what it was told, in turn, then nothing."""

    def __init__(self, *errors: Exception) -> None:
        self._errors = list(errors)
        self.count = 0

    async def __call__(self, _: Server) -> None:
        self.count += 1
        if self._errors:
            raise self._errors.pop(0)


def broken_once(status: int | None) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    left = [True]

    def generate(p: dict[str, Any]) -> dict[str, Any] | None:
        if left[0]:
            left[0] = False
            if status is None:
                return None
            raise Refusal(status)
        return answer(p)

    return generate


@pytest.mark.parametrize(("trouble", "checked"), [(None, 1), (502, 1), (500, 0)])
def test_a_server_that_could_not_be_reached_is_checked_before_it_is_asked_again(
    trouble: int | None, checked: int
) -> None:
    check = Checks()
    with serving(broken_once(trouble), health_generate=lambda _: {}) as server:
        found, _ = with_pool([server], lambda pool: ask_many(pool, 1), check=check)
        assert ids(found) == EXPECTED[:1]
    assert check.count == checked


def test_a_server_that_still_holds_a_request_is_the_same_one() -> None:
    check, first, release = Checks(), broken_once(None), threading.Event()

    def generate(p: dict[str, Any]) -> dict[str, Any] | None:
        if p["input_ids"] == [1, 1]:
            assert release.wait(30)
            return answer(p)
        return first(p)

    def well(_: dict[str, Any]) -> dict[str, Any]:
        release.set()
        return {}

    with serving(generate, health_generate=well) as server:

        async def run(pool: ServerPool) -> Any:
            held = asyncio.create_task(pool.ask("r1", payload(1)))
            while not server.count("/generate"):
                await asyncio.sleep(0.01)
            return [await pool.ask("r0", payload(0)), await held]

        found, _ = with_pool([server], run, check=check)
        assert ids(found) == EXPECTED[:2]
    assert check.count == 0


def test_a_check_that_fails_in_a_way_of_its_own_loses_the_server_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 0.05)
    check = Checks(OSError(116, "Stale file handle"))
    with serving(broken_once(None), health_generate=lambda _: {}) as server:

        async def run(pool: ServerPool) -> Any:
            return await asyncio.wait_for(ask_many(pool, 1), 30)

        found, logs = with_pool([server], run, check=check)
        assert ids(found) == EXPECTED[:1]
    assert check.count == 2
    assert logs[0] == f"SGLang server {server.url} is lost: OSError: [Errno 116] Stale file handle"


def test_a_probe_that_fails_in_a_way_of_its_own_loses_the_server() -> None:
    with serving(answer) as server:

        async def run(pool: ServerPool) -> None:
            pool.servers[0].url = "http://127.0.0.1:99999"  # no port, which is no error of HTTP
            await pool.health._beat(pool.servers[0])
            await asyncio.wait_for(until_down(pool), 30)

        _, (told,) = with_pool([server], run)
    assert "is lost: " in told and "99999" in told


async def until_down(pool: ServerPool) -> None:
    while pool.servers[0].state is not State.DOWN:
        await asyncio.sleep(0.01)


def test_a_server_that_is_down_is_looked_for_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 0.05)
    check = Checks(RetryableError("not there"), DraftsmithError("serves another model"))
    with serving(answer) as server:

        async def run(pool: ServerPool) -> Any:
            asking = asyncio.gather(*(pool.ask(f"r{i}", payload(i)) for i in range(8)))
            await until_down(pool)
            server.start()
            return ids(await asyncio.wait_for(asking, 30))

        server.stop()
        found, logs = with_pool([server], run, check=check)
        assert found == EXPECTED[:8]
    assert check.count == 3
    assert [line.removeprefix(f"SGLang server {server.url} ") for line in logs][1:] == [
        "left out: serves another model",
        "is there again",
    ]


def test_a_server_that_was_full_and_returns_gets_as_many_requests_as_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 0.05)
    left, together = [4], threading.Barrier(4)  # nothing is answered before four requests are there

    def full_then_gone(_: dict[str, Any]) -> dict[str, Any] | None:
        left[0] -= 1
        if left[0] >= 0:
            raise Refusal(429)
        server.stop()
        return None

    def well(p: dict[str, Any]) -> dict[str, Any]:
        together.wait(20)
        return answer(p)

    with serving(full_then_gone) as server:

        async def run(pool: ServerPool) -> Any:
            asking = asyncio.gather(*(pool.ask(f"r{i}", payload(i)) for i in range(4)))
            await until_down(pool)
            server.replies["/generate"] = well
            server.start()
            return ids(await asyncio.wait_for(asking, 30))

        found, _ = with_pool([server], run, check=Checks())
        assert found == EXPECTED[:4]


def test_while_all_servers_are_down_they_are_looked_for_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 600.0)
    monkeypatch.setattr(health, "_LONGEST_RETURN_S", 600.0)
    monkeypatch.setattr(health, "_ALL_DOWN_RETURN_S", 0.05)
    with serving(answer) as server:

        async def run(pool: ServerPool) -> Any:
            asking = asyncio.create_task(ask_many(pool, 1))
            await until_down(pool)
            server.start()
            return ids(await asyncio.wait_for(asking, 30))

        server.stop()
        found, _ = with_pool([server], run, check=Checks())
        assert found == EXPECTED[:1]


def test_a_check_that_is_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 0.05)
    monkeypatch.setattr(pooling, "_ALL_DOWN_S", 0.5)

    async def takes_long(_: Server) -> None:
        await asyncio.sleep(2.0)

    with serving(answer) as server:

        async def run(pool: ServerPool) -> Any:
            asking = asyncio.create_task(ask_many(pool, 1))
            await until_down(pool)
            server.start()
            return ids(await asyncio.wait_for(asking, 30))

        server.stop()
        found, _ = with_pool([server], run, check=takes_long)
        assert found == EXPECTED[:1]


@pytest.mark.parametrize("launched", [False, True])
def test_nobody_waits_for_ever_for_servers_that_are_down(launched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "_ALL_DOWN_S", 600 if launched else 0.3)
    with serving(answer) as server:

        async def run(pool: ServerPool) -> None:
            pool.servers[0].launched = launched
            with pytest.raises(RetryableError, match=rf"no SGLang server is left: {server.url}"):
                await asyncio.wait_for(pool.ask("r0", payload()), 30)

        server.stop()
        with_pool([server], run, check=Checks(*[RetryableError("away")] * 99))
