"""The servers of a stage: which come back and as what, and how several are started."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang import fleet as fleets
from draftsmith.stages.engines.sglang import health
from draftsmith.stages.engines.sglang.admission import Admission
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.fleet import Fleet
from draftsmith.stages.engines.sglang.health import Server, State
from draftsmith.stages.engines.sglang.server import ServerProcess
from draftsmith.stages.stored import DRAFTER_FOLDER
from tests.stages.engines.http_server import HttpServer, answer
from tests.stages.engines.server_processes import living
from tests.stages.engines.test_sglang_engine import STAND_IN, opened
from tests.stages.engines.test_sglang_handshake import expected_of, good_model, good_server, server_of, speculating
from tests.testbed.drafter import DrafterArtifacts

REQUESTS = [Request(f"r{i}", [10 * i + 5], SamplingParams(3)) for i in range(12)]
RIGHT = {f"r{i}": [10 * i + 6, 10 * i + 7, 10 * i + 8] for i in range(12)}


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, None)


@pytest.fixture(autouse=True)
def looked_for_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_RETURN_S", 0.05)


def away_after(server: HttpServer, answers: int) -> None:
    """After so many answers the server breaks off a connection and takes no new one."""

    def generate(payload: dict[str, Any]) -> dict[str, Any] | None:
        if "rid" in payload and (left := left_of.pop("answers", None)) is not None:
            if left == 0:
                server.stop()
                return None
            left_of["answers"] = left - 1
        return answer(payload) if server.running else None

    left_of = {"answers": answers}
    server.replies["/generate"] = generate


def answers_of(engine: Any, requests: list[Request] = REQUESTS) -> Iterator[tuple[str, list[int]]]:
    for each in engine.generate(requests):
        yield each.request.request_id, each.response_ids


def test_the_only_server_may_be_started_again_and_is_checked_as_at_the_start(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    logs: list[str] = []

    def told(line: str) -> None:
        logs.append(line)
        if "is lost" in line:
            server.start()

    with (
        server_of(plain) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url], "concurrency": 1}, log=told) as engine,
    ):
        away_after(server, 3)
        assert dict(answers_of(engine)) == RIGHT
        assert server.count("/server_info") == 2
    assert f"SGLang server {server.url} is there again" in logs


def test_a_server_that_comes_back_as_another_is_left_out(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    logs: list[str] = []

    def told(line: str) -> None:
        logs.append(line)
        if "is lost" in line:
            first.replies["/model_info"] = lambda _: {"model_path": "/other", "model_type": "llama"}
            first.start()

    with (
        server_of(plain) as first,
        server_of(plain) as second,
        opened(tiny_drafter, tmp_path, {"urls": [first.url, second.url], "concurrency": 1}, log=told) as engine,
    ):
        away_after(first, 1)
        asked_before = first.count("/generate")
        assert dict(answers_of(engine)) == RIGHT
        while not any(line.startswith(f"left out: engine: the server {first.url} serves /other") for line in logs):
            dict(answers_of(engine, REQUESTS[:1]))
        assert first.count("/generate") == asked_before + 2
    assert f"SGLang server {first.url} is there again" not in logs


@pytest.mark.parametrize("by", ["started again", "weights put in"])
def test_a_server_that_becomes_another_without_a_request_noticing_is_asked_no_more(
    by: str, plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway leads to the next process when the last one has finished its requests; answers go on."""
    monkeypatch.setattr(health, "_FOLLOW_S", 0.05)
    logs: list[str] = []
    says = {"startup_time": {"load_weight": 1.25}, "random_seed": 1}
    with (
        server_of(plain, server=says) as server,
        server_of(plain) as good,
        opened(tiny_drafter, tmp_path, {"urls": [server.url, good.url]}, log=logs.append) as engine,
    ):
        if by == "started again":
            says |= {"random_seed": 2, "max_req_input_len": 10}
        else:
            server.replies["/model_info"] = lambda _: good_model(plain) | {"model_path": "/new", "is_generation": False}
        told = f"SGLang server {server.url} is lost: engine: the server {server.url} "
        deadline = time.monotonic() + 20
        while not any(line.startswith(told) for line in logs):
            assert time.monotonic() < deadline
            assert dict(answers_of(engine)) == RIGHT
        server.asked.clear()
        assert dict(answers_of(engine)) == RIGHT
        assert not any("rid" in payload for _, payload in server.asked)


def test_a_server_that_was_not_there_at_the_start_is_let_in_later(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    logs: list[str] = []
    with server_of(plain, server={"kv_cache_dtype": "fp8_e5m2"}) as late, server_of(plain) as here:
        late.stop()
        with opened(tiny_drafter, tmp_path, {"urls": [late.url, here.url]}, log=logs.append) as engine:
            assert any(line.startswith(f"left out: engine: {late.url} cannot be reached") for line in logs)
            late.start()
            while f"SGLang server {late.url} is there again" not in logs:
                assert dict(answers_of(engine)) == RIGHT
            late.asked.clear()
            assert dict(answers_of(engine)) == RIGHT
            assert late.count("/generate") > 0
    assert sum(f"{late.url} computes with kv_cache_dtype fp8_e5m2" in line for line in logs) == 1, "as at the start"


@pytest.mark.parametrize(
    ("unlike", "what"),
    [
        ({"server": {"speculative_algorithm": "EAGLE3"}}, "speculates by EAGLE3, not by DFLASH"),
        ({"generate": speculating}, "does not record verify steps"),
        ({"server": {"device": "cpu"}}, "verifies greedily"),
    ],
)
def test_what_comes_back_must_be_like_those_that_were_asked(
    unlike: dict[str, Any], what: str, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """Answers of one stage are of one kind: the engine has said what they come with."""
    from draftsmith.stages.drafters.config import DraftingConfig
    from draftsmith.stages.engines.sglang.engine import open_sglang

    assisted = expected_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)
    with ExitStack() as stack:
        good = stack.enter_context(server_of(assisted, digest=assisted.drafter_digest))
        other = stack.enter_context(server_of(assisted, **{"digest": assisted.drafter_digest, **unlike}))
        other.stop()
        logs: list[str] = []
        engine = stack.enter_context(
            open_sglang(
                SGLangEngineConfig.model_validate({"kind": "sglang", "urls": [other.url, good.url]}),
                target_folder=tiny_drafter.target,
                drafter_folder=tiny_drafter.drafter / DRAFTER_FOLDER,
                drafting=DraftingConfig(),
                longest=100,
                work=tmp_path,
                log=logs.append,
            )
        )
        assert engine.records_trace
        other.start()
        while not any(f"left out: engine: the server {other.url} {what}" in line for line in logs):
            list(answers_of(engine, [Request("r", [5], SamplingParams(8))]))
        assert good_server(assisted)["speculative_algorithm"] == "DFLASH"


def test_no_two_processes_of_a_fleet_get_the_same_port(plain: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter([20_001, 20_001, 20_001, 20_002, 20_001, 20_003])
    monkeypatch.setattr(fleets, "free_port", lambda: next(drawn))
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://a"]})
    fleet = Fleet(config, plain, [], print)
    assert [fleet._free_port() for _ in range(3)] == [20_001, 20_002, 20_003]


@pytest.mark.parametrize("routed", [False, True])
def test_a_server_is_started_again_as_often_as_the_config_says_and_checked_each_time(
    routed: bool, plain: Expected, tmp_path: Path
) -> None:
    """Behind a router at the address that the router knows."""
    ports: list[int | None] = []
    checked: list[Server] = []

    async def launch(_process: ServerProcess, port: int | None) -> None:
        ports.append(port)

    async def check(server: Server) -> None:
        checked.append(server)

    config = {"kind": "sglang", "python": sys.executable, "launch": {}, "restarts": 2}
    process = ServerProcess([sys.executable, "-c", ""], {}, tmp_path / "server.log")
    process.url = "http://a:30001"
    fleet: Any = Fleet(SGLangEngineConfig.model_validate(config), plain, [process], print)
    fleet._launch, fleet._admission, fleet._router = launch, SimpleNamespace(check=check), process if routed else None
    server = Server(process.url, launched=True)
    fleet._process_of[server] = process
    assert [asyncio.run(fleet._revive(server)) for _ in range(3)] == [True, True, False]
    assert server.reason.endswith("engine.restarts: 2 used up")
    assert ports == [30_001 if routed else None] * 2 and checked == [server] * 2


@pytest.mark.parametrize("restarts", [1, 0])
def test_a_launched_server_that_does_not_answer_the_handshake_is_started_again(
    restarts: int, plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    replies = {
        "/model_info": good_model(plain),
        "/server_info": good_server(plain),
        "/tokenize": {"tokens": plain.probe_ids},
    }
    told = {"STAND_IN": "silent once", "STAND_IN_REPLIES": json.dumps(replies), "PYTHONPATH": str(STAND_IN)}
    launch = {"servers": 2, "environment": told, "options": {"device": "cpu"}}
    config = {"launch": launch, "python": sys.executable, "restarts": restarts, "concurrency": 4}
    with opened(tiny_drafter, tmp_path, config) as engine:
        assert engine._pool.places == 4 * (1 + restarts)
        running = [process.ended() is None for process in engine._fleet._processes]
        assert sum(running) == 1 + restarts
        assert dict(answers_of(engine)) == RIGHT


def test_whatever_happens_while_a_server_behind_a_router_is_started_again_the_others_hear_of_it(
    plain: Expected, tmp_path: Path
) -> None:
    folder, logs = tmp_path / "servers", list[str]()
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "python": sys.executable, "launch": {"servers": 2}})

    async def run() -> Server:
        process = ServerProcess([sys.executable, "-c", ""], {}, folder / "server.log")
        fleet = Fleet(config, plain, [process], logs.append)
        router = fleet._router = ServerProcess(["sleep", "600"], {}, tmp_path / "router.log")
        fleet._client = httpx.AsyncClient()
        process.start()
        router.start()
        while process.ended() is None:
            await asyncio.sleep(0.02)
        shutil.rmtree(folder)
        folder.touch()  # no server can be started there
        worker = Server(process.url, launched=True)
        fleet._process_of[worker] = process
        await asyncio.wait_for(fleet._watch([worker]), 30)
        assert router.ended() is not None
        await fleet.stop()
        return worker

    worker = asyncio.run(run())
    assert worker.state is State.DOWN
    assert any(f"{worker.url} is lost: " in line and "Not a directory" in line for line in logs)


def test_a_server_behind_a_router_that_comes_back_as_another_is_stopped(plain: Expected, tmp_path: Path) -> None:
    folder, logs = tmp_path / "servers", list[str]()
    config = SGLangEngineConfig.model_validate({"kind": "sglang", "python": sys.executable, "launch": {"servers": 2}})

    async def run() -> Server:
        line, told = [sys.executable, "-m", "sglang.launch_server"], {"PYTHONPATH": str(STAND_IN)}
        process = ServerProcess(line, {**told, "STAND_IN": "fail once"}, folder / "server.log")
        fleet = Fleet(config, plain, [process], logs.append)
        router = fleet._router = ServerProcess(["sleep", "600"], {}, tmp_path / "router.log")
        fleet._client = httpx.AsyncClient(trust_env=False)
        fleet._admission = Admission(fleet._client, plain, logs.append)
        process.start()
        router.start()
        while process.ended() is None:
            await asyncio.sleep(0.02)
        worker = Server(process.url, launched=True)
        fleet._process_of[worker] = process
        try:
            await asyncio.wait_for(fleet._watch([worker]), 60)
            assert living(folder) == []
        finally:
            await fleet.stop()
        return worker

    worker = asyncio.run(run())
    assert worker.state is State.DOWN
    assert (folder / "server.log").read_text().count("launch_server") == 2
    assert any(f"{worker.url} is lost: engine: {worker.url}/model_info gives no JSON object" in line for line in logs)


@pytest.mark.parametrize(
    ("servers", "restarts", "started", "ends"),
    [
        (2, 1, 3, "is it a SGLang server"),  # all have started
        (2, 0, 2, "ended with code 1 while it started"),
        (1, 1, 1, "ended with code 1 while it started"),
    ],
)
def test_one_of_several_servers_that_fails_is_started_again(
    servers: int, restarts: int, started: int, ends: str, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    environment = {"PYTHONPATH": str(STAND_IN), "STAND_IN": "fail once"}
    config = {"launch": {"servers": servers, "environment": environment, "options": {"device": "cpu"}}}
    logs: list[str] = []
    with (
        pytest.raises(DraftsmithError, match=ends) as caught,
        opened(tiny_drafter, tmp_path, {**config, "python": sys.executable, "restarts": restarts}, log=logs.append),
    ):
        raise AssertionError("it must not open")
    assert isinstance(caught.value, RetryableError) == (started < 3)
    starts = [log.read_text().count("launch_server") for log in (tmp_path / "servers").glob("sglang-*.log")]
    assert sum(starts) == started
    assert any("starting it again (0 restarts left)" in line for line in logs) == (started == 3)
