"""Requests that cannot be answered: they cost nothing but themselves, and one error names them all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import TRAJECTORIES
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.sglang import pool
from draftsmith.stages.engines.sglang.engine import _MOST_UNANSWERED, UnansweredError
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.rollout import STAGE, RolloutConfig
from draftsmith.stages.stored import DRAFTER_FOLDER, load_prompts
from tests.stages.engines.http_server import HttpServer, Refusal, answer, is_probe
from tests.stages.engines.test_sglang_engine import opened
from tests.stages.engines.test_sglang_handshake import expected_of, server_of, speculating
from tests.stages.engines.test_sglang_router import opened as opened_with_drafter
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

REQUESTS = [Request(f"r{i}", [i + 5], SamplingParams(3)) for i in range(100)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_BACKOFF_S", 0.02)


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, None)


def refusing(which: Callable[[list[int]], bool], status: int = 400) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(payload) and which(payload["input_ids"]):
            raise Refusal(status, "the prompt is not to its taste")
        return answer(payload)

    return generate


def asked_for(server: HttpServer) -> list[list[int]]:
    return [p["input_ids"] for path, p in server.asked if path == "/generate" and not is_probe(p)]


@pytest.mark.parametrize(("status", "again", "kind"), [(400, 1, UnansweredError), (500, 6, RetryableError)])
def test_others_are_answered_and_one_error_names_those_that_are_not(
    status: int,
    again: int,
    kind: type[DraftsmithError],
    plain: Expected,
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
) -> None:
    refused = [[8], [9], [60]]
    with (
        server_of(plain, generate=refusing(lambda ids: ids in refused, status)) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url], "concurrency": 4}) as engine,
    ):
        got = []
        told = r"3 requests \((r3|r4|r55), (r3|r4|r55), (r3|r4|r55)\) have no answer: request r\d+: .*not to its taste"
        with pytest.raises(kind, match=told):
            for each in engine.generate(REQUESTS):
                got.append(each.request.request_id)
        assert sorted(got) == sorted(r.request_id for r in REQUESTS if r.prompt_ids not in refused)
        assert len(asked_for(server)) == len(REQUESTS) - 3 + 3 * again
        assert server.count("/abort_request") == 0


def test_where_nothing_is_answered_it_stops_early_and_lets_what_was_sent_finish(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    enough = threading.Event()
    logs: list[str] = []

    def told(line: str) -> None:
        logs.append(line)
        if sum("left without an answer" in each for each in logs) == _MOST_UNANSWERED:
            enough.set()

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["input_ids"] == [5]:
            assert enough.wait(30)
        elif not is_probe(payload):
            raise Refusal(400)
        return answer(payload)

    with (
        server_of(plain, generate=generate) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url], "concurrency": 4}, log=told) as engine,
    ):
        got = []
        with pytest.raises(UnansweredError):
            for each in engine.generate(REQUESTS):
                got.append(each.request.request_id)
        assert got == ["r0"]
        assert _MOST_UNANSWERED < len(asked_for(server)) < len(REQUESTS)
        server.replies["/generate"] = answer
        assert len(list(engine.generate(REQUESTS))) == len(REQUESTS)


def test_requests_that_servers_died_with_are_named_once_and_the_others_are_answered(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """However many: as many as were in flight."""
    deadly = [request.request_id for request in REQUESTS[: _MOST_UNANSWERED + 5]]
    for url in ("http://a", "http://b"):
        pool.Deaths(tmp_path / "servers" / "deaths.json").add(deadly, url)
    with (
        server_of(plain) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url], "concurrency": 4}) as engine,
    ):
        got = []
        with pytest.raises(UnansweredError) as caught:
            for each in engine.generate(REQUESTS):
                got.append(each.request.request_id)
        assert all(name in str(caught.value) for name in deadly)
        assert sorted([*got, *deadly]) == sorted(request.request_id for request in REQUESTS)
        assert len(list(engine.generate(REQUESTS))) == len(REQUESTS)


def test_an_answer_that_was_retracted_is_taken_without_its_steps(
    tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Its tokens are right, its records have gaps. Asked for once more, it would be one more on a full server."""
    assisted = expected_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        done = speculating(payload, assisted.drafter_digest)
        if not is_probe(payload):
            done["meta_info"]["num_retractions"] = 1
        return done

    with (
        server_of(assisted, generate=generate) as server,
        opened_with_drafter(tiny_drafter, tmp_path, server.url) as engine,
    ):
        assert engine.records_trace
        (found,) = engine.generate([Request("r", [5], SamplingParams(8))])
        assert len(asked_for(server)) == 1
    assert found.response_ids == list(range(6, 14))
    assert (found.verify_steps, found.retractions, len(found.steps)) == (1, 1, 0)


def test_a_refused_key_ends_it_at_once(plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    with (
        server_of(plain, generate=refusing(lambda _: True, 401)) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url], "concurrency": 1}) as engine,
        pytest.raises(DraftsmithError, match=r"request r0: .*engine\.api_key_env") as caught,
    ):
        list(engine.generate(REQUESTS))
    assert not isinstance(caught.value, UnansweredError)


def test_a_rollout_keeps_all_answers_and_a_rerun_asks_only_for_the_missing_one(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    prompts = load_prompts(tiny_drafter.prompts, ["heldout"])[:20]
    refused = prompts[7]

    def run(urls: list[str]) -> RecordingContext:
        ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
        engine = {"kind": "sglang", "urls": urls, "concurrency": 2}
        config = {"splits": ["heldout"], "prompts": 20, "sampling": {"max_new_tokens": 8}, "engine": engine}
        STAGE.run(ctx, RolloutConfig.model_validate(config))
        return ctx

    def in_the_vocabulary(payload: dict[str, Any]) -> dict[str, Any]:
        return answer(payload) | {
            "output_ids": [payload["input_ids"][0]] * payload["sampling_params"]["max_new_tokens"]
        }

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["input_ids"] == refused.token_ids:
            raise Refusal(400, "not this one")
        return in_the_vocabulary(payload)

    with server_of(plain, generate=generate) as server:
        for number in (20, 1):
            server.asked.clear()
            with pytest.raises(UnansweredError, match=rf"request {refused.prompt_id}/0: .*not this one"):
                run([server.url])
            assert len(asked_for(server)) == number
        server.asked.clear()
        server.replies["/generate"] = in_the_vocabulary
        ctx = run([server.url])
        assert asked_for(server) == [refused.token_ids]
    written = read_table(ctx.out / "trajectories.parquet", TRAJECTORIES)["prompt_id"].to_pylist()
    assert written == prompts.ids
