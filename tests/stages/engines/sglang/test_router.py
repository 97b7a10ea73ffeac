"""Routers: the servers of an address, its number of requests, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.server import router_workers
from tests.stages.bench import step_rows
from tests.stages.engines.http_server import HttpServer, Reply, serving
from tests.stages.engines.stand_ins import Opened, refusing, server_of, speculating, with_client

REQUESTS = [Request(f"r{i}", [10 * i + 5], 8) for i in range(4)]


def without_unknown_fields(payload: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a router forwards."""
    sampling = {k: v for k, v in payload["sampling_params"].items() if k not in ("custom_params", "stream_interval")}
    return {**payload, "sampling_params": sampling}


@contextmanager
def router_of(*workers: HttpServer, healthy: bool = True) -> Iterator[HttpServer]:
    """Run a router that answers like the first of its workers."""

    def generate(payload: dict[str, Any]) -> dict[str, Any] | str | None:
        return workers[0].replies["/generate"](without_unknown_fields(payload))

    listed: Reply = lambda _: {"workers": [{"url": each.url, "is_healthy": healthy} for each in workers]}  # noqa: E731
    with serving(generate, workers=listed) as running:
        yield running


@pytest.mark.parametrize("asked_by_environment", [True, False])
def test_every_server_of_a_router_is_checked_and_requests_go_to_the_router(
    asked_by_environment: bool, assisted: ServerRequirements, opened: Opened
) -> None:
    """A request's own parameter is not forwarded; steps are recorded if the servers' environment asks for it."""

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if asked_by_environment:
            payload["sampling_params"]["custom_params"] = {"draftsmith_trace": True}
        return speculating(payload, assisted.drafter_digest)

    logs: list[str] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(server_of(assisted, server={"dp_size": n}, generate=generate)) for n in (1, 3)]
        front = stack.enter_context(router_of(*workers))
        given = {"urls": [front.url], "concurrency": 2}
        engine = stack.enter_context(opened(given, drafter=assisted.drafter_folder, log=logs.append))
        assert engine.records_trace is asked_by_environment
        answers = list(engine.generate(REQUESTS))
        assert engine._pool.capacity == 2 * 4
        assert [worker.count("/server_info") for worker in workers] == [1, 1]
        assert front.count("/generate") == 1 + len(REQUESTS)
    assert f"{front.url} routes to 2 servers" in logs
    assert any("verify steps are not recorded" in each for each in logs) is not asked_by_environment
    assert all(len(step_rows(each.steps)) == (1 if asked_by_environment else 0) for each in answers)
    assert all(each.verify_steps == 1 for each in answers)


def test_a_router_with_a_wrong_server_is_refused(assisted: ServerRequirements, opened: Opened) -> None:
    with server_of(assisted) as good, server_of(assisted, server={"speculative_num_draft_tokens": 4}) as bad:
        with (
            router_of(good, bad) as front,
            pytest.raises(DraftsmithError, match=rf"{bad.url} drafts blocks of 4"),
            opened({"urls": [front.url]}, drafter=assisted.drafter_folder),
        ):
            pass
        with (
            router_of(good, healthy=False) as front,
            pytest.raises(RetryableError, match=rf"router {front.url} has no healthy server"),
            opened({"urls": [front.url]}, drafter=assisted.drafter_folder),
        ):
            pass


def test_a_router_that_requires_a_key_is_not_taken_for_a_server() -> None:
    def workers(reply: Reply | None) -> list[str] | None:
        with serving(lambda _: {}, **({} if reply is None else {"workers": reply})) as running:
            return with_client(lambda client: router_workers(client, running.url))

    assert workers(None) is None
    assert workers(lambda _: {"something": "else"}) is None
    assert workers(lambda _: {"workers": [{"url": "http://a", "is_healthy": True}]}) == ["http://a"]
    with pytest.raises(DraftsmithError, match="api_key_env"):
        workers(refusing(401))
    for unreachable in (refusing(503), refusing(500), lambda _: None):
        with pytest.raises(RetryableError, match="Check that the server runs"):
            workers(unreachable)
    assert workers(refusing(405)) is None and workers(refusing(501)) is None
