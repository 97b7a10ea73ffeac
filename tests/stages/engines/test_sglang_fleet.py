"""The servers of a stage: which are left out at the start, and what becomes of those that die."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang import fleet as fleets
from draftsmith.stages.engines.sglang import pool as pooling
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.fleet import Fleet
from tests.stages.engines.http_server import HttpServer, answer
from tests.stages.engines.server_processes import living
from tests.stages.engines.test_sglang_engine import STAND_IN, opened
from tests.stages.engines.test_sglang_handshake import expected_of, good_model, good_server, server_of
from tests.testbed.drafter import DrafterArtifacts

REQUESTS = [Request(f"r{i}", [10 * i + 5], SamplingParams(3)) for i in range(12)]
RIGHT = {f"r{i}": [10 * i + 6, 10 * i + 7, 10 * i + 8] for i in range(12)}


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, None)


def away_after(server: HttpServer, answers: int) -> None:
    """After so many answers the server breaks off a connection and takes no new one."""
    left = iter([True] * answers)

    def generate(payload: dict[str, Any]) -> dict[str, Any] | None:
        if not next(left, False):
            server.stop()
        return answer(payload) if server.running else None

    server.replies["/generate"] = generate


def answers_of(engine: Any) -> Iterator[tuple[str, list[int]]]:
    for each in engine.generate(REQUESTS):
        yield each.request.request_id, each.response_ids


def test_a_server_that_dies_leaves_its_requests_to_the_others_and_the_last_one_ends_the_stage(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling, "_PATIENCE_S", 0.2)
    logs: list[str] = []
    with (
        server_of(plain) as first,
        server_of(plain) as second,
        opened(tiny_drafter, tmp_path, {"urls": [first.url, second.url], "concurrency": 1}, log=logs.append) as engine,
    ):
        away_after(first, 1)
        assert dict(answers_of(engine)) == RIGHT
        assert any(f"{first.url} is lost" in line for line in logs)
        away_after(second, 3)
        kept = []
        with pytest.raises(RetryableError, match="no SGLang server is left"):
            for name, _ in answers_of(engine):
                kept.append(name)
        assert len(kept) == 3


def test_a_given_server_that_does_not_answer_is_left_out(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    logs: list[str] = []
    with server_of(plain) as away, server_of(plain) as here:
        away.stop()
        with opened(tiny_drafter, tmp_path, {"urls": [away.url, here.url]}, log=logs.append) as engine:
            assert dict(answers_of(engine)) == RIGHT
        with (
            pytest.raises(RetryableError, match=f"{away.url} cannot be reached"),
            opened(tiny_drafter, tmp_path, {"urls": [away.url]}),
        ):
            raise AssertionError("it must not open")
    assert any(line.startswith(f"left out: engine: {away.url} cannot be reached") for line in logs)


def test_no_two_processes_of_a_fleet_get_the_same_port(
    plain: Expected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = iter([20_001, 20_001, 20_001, 20_002, 20_001, 20_003])
    monkeypatch.setattr(fleets, "free_port", lambda: next(drawn))
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://a"]})
    fleet = Fleet(config, plain, [], tmp_path, print)
    assert [fleet._free_port() for _ in range(3)] == [20_001, 20_002, 20_003]


@pytest.mark.parametrize("mode", ["silent once", "fail once"])
def test_one_of_several_launched_servers_that_does_not_come_up_is_left_out_and_stopped(
    mode: str, plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    replies = {"/model_info": good_model(plain), "/server_info": good_server(plain)}
    environment = {"STAND_IN": mode, "STAND_IN_REPLIES": json.dumps(replies), "PYTHONPATH": str(STAND_IN)}
    launch = {"servers": 2, "environment": environment, "options": {"device": "cpu"}}
    with opened(tiny_drafter, tmp_path, {"launch": launch, "python": sys.executable, "concurrency": 4}) as engine:
        assert engine._pool.capacity == 4
        assert sum(process.ended() is None for process in engine._fleet._processes) == 1
        assert dict(answers_of(engine)) == RIGHT
    assert living(tmp_path / "servers") == []


def test_a_single_launched_server_that_does_not_start_is_worth_a_retry(
    tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(STAND_IN), "STAND_IN": "fail once"}
    config = {"launch": {"environment": environment, "options": {"device": "cpu"}}, "python": sys.executable}
    with (
        pytest.raises(RetryableError, match="ended with code 1 while it started"),
        opened(tiny_drafter, tmp_path, config),
    ):
        raise AssertionError("it must not open")


def test_a_launched_server_that_dies_is_known_by_its_process(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Without waiting for failed probes; the error names its end and its log."""
    replies = {"/model_info": good_model(plain), "/server_info": good_server(plain)}
    environment = {"STAND_IN_REPLIES": json.dumps(replies), "PYTHONPATH": str(STAND_IN)}
    launch = {"environment": environment, "options": {"device": "cpu"}}
    with opened(tiny_drafter, tmp_path, {"launch": launch, "python": sys.executable}) as engine:
        (process,) = engine._fleet._processes
        process._process.kill()
        with pytest.raises(DraftsmithError, match=r"was killed \(SIGKILL\) \(log: .*sglang-0\.log\)") as caught:
            list(answers_of(engine))
    assert isinstance(caught.value, RetryableError)
