"""The engine on servers that refuse, die, hang or do not come up: all other requests are answered, and who waits may
stop."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, StageInterrupted
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers import dispatch
from draftsmith.stages.engines.servers.engine import _MAX_UNANSWERED, ServerEngine, UnansweredError
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.stage import STAGE, RolloutConfig
from tests.stages.engines.http_server import Refusal, answer, is_probe
from tests.stages.engines.stand_ins import (
    STAND_IN,
    EngineOn,
    Opened,
    asked_for,
    good_model,
    good_server,
    living,
    refusing,
    server_of,
    speculating,
)
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

FEW = [Request(f"r{i}", [10 * i + 5], 3) for i in range(12)]
RIGHT = {f"r{i}": [10 * i + 6, 10 * i + 7, 10 * i + 8] for i in range(12)}
MANY = [Request(f"r{i}", [i + 5], 3) for i in range(100)]


def answers_of(engine: ServerEngine) -> dict[str, list[int]]:
    return {each.request.request_id: each.response_ids for each in engine.generate(FEW)}


def names_until_error(engine: ServerEngine, kind: type[DraftsmithError]) -> tuple[list[str], DraftsmithError]:
    """Return the requests of MANY that were answered, and the error after them."""
    got = []
    with pytest.raises(kind) as caught:
        for each in engine.generate(MANY):
            got.append(each.request.request_id)
    return sorted(got), caught.value


# ---- requests without an answer


def test_after_a_bad_answer_the_request_goes_to_another_server(plain: ServerRequirements, opened: Opened) -> None:
    def cut_short(payload: dict[str, Any]) -> dict[str, Any]:
        return answer(payload) | ({} if is_probe(payload) else {"output_ids": [1]})

    logs: list[str] = []
    with (
        server_of(plain, generate=cut_short) as bad,
        server_of(plain) as good,
        opened({"urls": [bad.url, good.url]}, log=logs.append) as engine,
    ):
        assert answers_of(engine) == RIGHT
        assert 1 <= engine.retries <= len(FEW)
    assert sum(bad.url in line for line in logs) >= engine.retries


@pytest.mark.parametrize(("status", "again", "kind"), [(400, 1, UnansweredError), (500, 6, RetryableError)])
def test_other_requests_are_answered_and_one_error_names_the_failed_ones(
    status: int, again: int, kind: type[DraftsmithError], plain: ServerRequirements, engine_on: EngineOn
) -> None:
    refused = [[8], [9], [60]]
    with engine_on(plain, {"concurrency": 4}, generate=refusing(status, which=refused.__contains__)) as (
        server,
        engine,
    ):
        got, error = names_until_error(engine, kind)
        assert got == sorted(r.request_id for r in MANY if r.prompt_ids not in refused)
        assert all(name in str(error) for name in ("r3", "r4", "r55"))
        assert len(asked_for(server)) == len(MANY) - 3 + 3 * again


def test_if_all_requests_fail_it_stops_early_and_lets_sent_requests_finish(
    plain: ServerRequirements, engine_on: EngineOn
) -> None:
    enough = threading.Event()
    logs: list[str] = []

    def told(line: str) -> None:
        logs.append(line)
        if sum("request failed" in each for each in logs) == _MAX_UNANSWERED:
            enough.set()

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["input_ids"] == [5]:
            assert enough.wait(30)
        elif not is_probe(payload):
            raise Refusal(400)
        return answer(payload)

    with engine_on(plain, {"concurrency": 4}, log=told, generate=generate) as (server, engine):
        got, _ = names_until_error(engine, UnansweredError)
        assert got == ["r0"]
        assert _MAX_UNANSWERED < len(asked_for(server)) < len(MANY)
        server.replies["/generate"] = answer
        assert len(list(engine.generate(MANY))) == len(MANY)


def test_requests_that_servers_died_with_are_reported_once_and_the_others_are_answered(
    plain: ServerRequirements, tmp_path: Path, engine_on: EngineOn
) -> None:
    """As many as were in flight may be affected."""
    deadly = [request.request_id for request in MANY[: _MAX_UNANSWERED + 5]]
    for url in ("http://a", "http://b"):
        dispatch.DeathLog(tmp_path / "servers" / "deaths.json").record(deadly, url)
    with engine_on(plain, {"concurrency": 4}) as (_server, engine):
        got, error = names_until_error(engine, UnansweredError)
        assert all(name in str(error) for name in deadly)
        assert sorted([*got, *deadly]) == sorted(request.request_id for request in MANY)
        assert len(list(engine.generate(MANY))) == len(MANY)


def test_a_retracted_answer_is_used_without_its_steps(assisted: ServerRequirements, engine_on: EngineOn) -> None:
    """Its tokens are right, its records have gaps. Sending it again would add load to a full server."""

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        done = speculating(payload, assisted.drafter_digest)
        if not is_probe(payload):
            done["meta_info"]["num_retractions"] = 1
        return done

    with engine_on(assisted, generate=generate) as (server, engine):
        assert engine.records_trace
        (found,) = engine.generate([Request("r", [5], 8)])
        assert len(asked_for(server)) == 1
    assert found.response_ids == list(range(6, 14))
    assert (found.verify_steps, found.retractions, found.steps) == (1, 1, None)


def test_a_refused_key_ends_generation_immediately(plain: ServerRequirements, engine_on: EngineOn) -> None:
    with engine_on(plain, {"concurrency": 1}, generate=refusing(401)) as (_server, engine):
        _, error = names_until_error(engine, DraftsmithError)
    assert "engine.api_key_env" in str(error) and not isinstance(error, UnansweredError)


def in_the_vocabulary(payload: dict[str, Any], reply: Callable[..., dict[str, Any]] = answer) -> dict[str, Any]:
    return reply(payload) | {"output_ids": payload["input_ids"][:1] * payload["sampling_params"]["max_new_tokens"]}


def test_a_rollout_keeps_all_answers_and_a_rerun_generates_only_the_missing_one(
    plain: ServerRequirements, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    prompts = load_prompts(tiny_drafter.prompts, ["heldout"])[:20]
    refused = prompts[7]

    def run(urls: list[str]) -> RecordingContext:
        ctx = RecordingContext.under(tmp_path, {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts})
        engine = {"kind": "sglang", "urls": urls, "concurrency": 2}
        config = {"splits": ["heldout"], "prompts": 20, "sampling": {"max_new_tokens": 8}, "engine": engine}
        STAGE.run(ctx, RolloutConfig.model_validate(config))
        return ctx

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if payload["input_ids"] == refused.token_ids:
            raise Refusal(400, "not this one")
        return in_the_vocabulary(payload)

    with server_of(plain, generate=generate) as server:
        for number in (20, 1):
            server.asked.clear()
            with pytest.raises(UnansweredError, match=f"{refused.prompt_id}/0"):
                run([server.url])
            assert len(asked_for(server)) == number
        server.asked.clear()
        server.replies["/generate"] = in_the_vocabulary
        ctx = run([server.url])
        assert asked_for(server) == [refused.token_ids]
    written = read_table(ctx.out / "trajectories.parquet", TRAJECTORIES)["prompt_id"].to_pylist()
    assert written == prompts.ids


def test_a_rollout_records_that_its_servers_compute_another_target(
    assisted: ServerRequirements, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Mining's parity gate reads it."""
    made = tiny_drafter
    inputs = {"target": made.target, "prompts": made.prompts, "drafter": made.drafter}
    ctx = RecordingContext.under(tmp_path, inputs)

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        return in_the_vocabulary(payload, speculating)

    with server_of(assisted, server={"kv_cache_dtype": "fp8_e4m3"}, generate=generate) as server:
        engine = {"kind": "sglang", "urls": [server.url], "concurrency": 2}
        config = {"splits": ["heldout"], "prompts": 2, "sampling": {"max_new_tokens": 8}, "engine": engine}
        STAGE.run(ctx, RolloutConfig.model_validate(config))
    assert json.loads((ctx.out / "trace.json").read_text())["differs"] == ["kv_cache_dtype fp8_e4m3"]


# ---- servers that are lost, or do not come up


def test_a_running_server_that_does_not_answer_is_left_out(plain: ServerRequirements, opened: Opened) -> None:
    logs: list[str] = []
    with server_of(plain) as ended, server_of(plain) as here:
        ended.stop()
        with opened({"urls": [ended.url, here.url]}, log=logs.append) as engine:
            assert answers_of(engine) == RIGHT
        with pytest.raises(RetryableError, match=ended.url), opened({"urls": [ended.url]}):
            raise AssertionError("it must not open")
    assert any(ended.url in line for line in logs)


def launched(expected: ServerRequirements, mode: str = "serve", **launch: Any) -> dict[str, Any]:
    """Return a config that launches stand-ins."""
    replies = {"/model_info": good_model(expected), "/server_info": good_server(expected)}
    environment = {"STAND_IN": mode, "STAND_IN_REPLIES": json.dumps(replies), "PYTHONPATH": STAND_IN}
    launch = {"environment": environment, "options": {"device": "cpu"}, **launch}
    return {"launch": launch, "python": sys.executable, "concurrency": 4}


@pytest.mark.parametrize("mode", ["silent once", "fail once"])
def test_a_launched_server_that_does_not_come_up_is_started_once_more_on_another_port(
    mode: str, plain: ServerRequirements, tmp_path: Path, opened: Opened
) -> None:
    logs: list[str] = []
    with opened(launched(plain, mode, servers=2), log=logs.append) as engine:
        assert engine._pool.capacity == 8
        assert answers_of(engine) == RIGHT
    assert sum("started once more" in line for line in logs) == 1
    starts = "".join(path.read_text() for path in (tmp_path / "servers").glob("sglang-*.log"))
    assert len(set(re.findall(r"--port (\d+)", starts))) == 3
    assert living(tmp_path / "servers") == []


def test_one_of_several_launched_servers_that_fails_again_is_left_out_and_stopped(
    plain: ServerRequirements, tmp_path: Path, opened: Opened
) -> None:
    with opened(launched(plain, "one lives", servers=2)) as engine:
        assert engine._pool.capacity == 4
        assert sum(process.ended() is None for process in engine._fleet._processes) == 1
        assert answers_of(engine) == RIGHT
    assert living(tmp_path / "servers") == []


@pytest.mark.parametrize(
    ("mode", "kind", "said"),
    [
        ("fail", RetryableError, "sglang-0.log"),
        ("refuse", DraftsmithError, "engine.launch.options"),
        ("mute", RetryableError, "engine.launch.start_timeout_s"),
        ("serve", DraftsmithError, "has no /server_info"),
    ],
)
def test_a_server_that_does_not_start_as_sglang_does_is_one_error(
    mode: str, kind: type[DraftsmithError], said: str, tmp_path: Path, opened: Opened
) -> None:
    logs: list[str] = []
    environment = {"PYTHONPATH": STAND_IN, "STAND_IN": mode}
    launch = {"environment": environment, "start_timeout_s": 2 if mode == "mute" else 60}
    with (
        pytest.raises(DraftsmithError, match=said) as caught,
        opened({"launch": launch, "python": sys.executable}, log=logs.append),
    ):
        raise AssertionError("it must not open")
    assert type(caught.value) is kind
    assert any("no CUDA device here" in line for line in logs) is (mode == "fail")
    assert not living(tmp_path / "servers")


# ---- waiting


def test_a_new_concurrency_applies_from_the_first_request(plain: ServerRequirements, engine_on: EngineOn) -> None:
    """Otherwise a timed run would also measure requests of the one before it."""
    with engine_on(plain, generate=lambda p: answer(p, delay_s=0.0 if is_probe(p) else 0.3)) as (server, engine):
        for bound in (1, 8, 1, 8):
            engine.set_concurrency(bound)
            server.most_at_once = 0
            assert len(list(engine.generate(MANY[:bound]))) == bound
            assert server.most_at_once == bound


def when(stop: threading.Event) -> Callable[[], None]:
    def check() -> None:
        if stop.is_set():
            raise StageInterrupted("asked to stop")

    return check


def test_a_stage_that_waits_for_an_answer_reacts_to_a_stop_within_seconds(
    plain: ServerRequirements, engine_on: EngineOn
) -> None:
    stop = threading.Event()

    def hangs(payload: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(payload) and payload["input_ids"] == FEW[3].prompt_ids:
            stop.set()
            time.sleep(60)
        return answer(payload)

    begun = time.monotonic()
    with pytest.raises(StageInterrupted), engine_on(plain, check=when(stop), generate=hangs) as (_server, engine):
        answers_of(engine)
    assert time.monotonic() - begun < 20


def test_a_stage_that_waits_for_a_server_to_start_reacts_to_a_stop_within_seconds(opened: Opened) -> None:
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    mute = {"environment": {"PYTHONPATH": STAND_IN, "STAND_IN": "mute"}, "start_timeout_s": 600}
    begun = time.monotonic()
    with (
        pytest.raises(StageInterrupted),
        opened({"launch": mute, "python": sys.executable}, check=when(stop)),
    ):
        raise AssertionError("it must not open")
    assert time.monotonic() - begun < 30
