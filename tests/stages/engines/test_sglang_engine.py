"""The engine on real HTTP servers: bad answers, and a stage that is asked to stop while it waits."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.base import Request, SamplingParams
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.engine import UnansweredError, open_sglang
from draftsmith.stages.engines.sglang.expected import Expected
from tests.stages.engines.http_server import Refusal, answer, is_probe
from tests.stages.engines.test_sglang_handshake import expected_of, server_of
from tests.testbed.drafter import DrafterArtifacts

STAND_IN = Path(__file__).parent / "stand_in"
REQUESTS = [Request(f"r{i}", [10 * i + 5], SamplingParams(3)) for i in range(4)]


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, None)


def opened(made: DrafterArtifacts, work: Path, config: dict[str, Any], **more: Any) -> Any:
    return open_sglang(
        SGLangEngineConfig.model_validate({"kind": "sglang", **config}),
        target_folder=made.target,
        drafter_folder=None,
        drafting=DraftingConfig(),
        longest=100,
        work=work,
        log=more.pop("log", print),
        **more,
    )


def asked_by_us(payload: dict[str, Any]) -> bool:
    return payload["input_ids"] in [request.prompt_ids for request in REQUESTS]


def bad_for(request: int, times: int, **wrong: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The right answers, but for the first ones to one request."""
    left = [times]

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        done = answer(payload)
        if not is_probe(payload) and payload["input_ids"] == REQUESTS[request].prompt_ids and left[0]:
            left[0] -= 1
            done |= wrong
        return done

    return generate


BAD = {
    "outside the vocabulary": {"output_ids": [1, 2, 10**6]},
    "cut short": {"output_ids": [1]},
    "empty": {"output_ids": []},
}


@pytest.mark.parametrize("wrong", BAD.values(), ids=BAD)
def test_a_bad_answer_is_asked_for_again_at_another_server(
    wrong: dict[str, Any], plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    logs: list[str] = []
    with (
        server_of(plain, generate=lambda p: answer(p) | (wrong if asked_by_us(p) else {})) as bad,
        server_of(plain) as good,
        opened(tiny_drafter, tmp_path, {"urls": [bad.url, good.url]}, log=logs.append) as engine,
    ):
        answers = {each.request.request_id: each.response_ids for each in engine.generate(REQUESTS)}
    assert answers == {f"r{i}": [10 * i + 6, 10 * i + 7, 10 * i + 8] for i in range(4)}
    told = [line for line in logs if line.startswith("asked for again: request r")]
    assert 1 <= len(told) <= 4 and all(bad.url in line for line in told)


MANY = [Request(f"r{i}", [i + 5], SamplingParams(3)) for i in range(100)]


def test_the_only_server_is_asked_twice_more_before_a_bad_answer_ends_a_rollout(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    for times, ends in ((2, False), (3, True)):
        logs: list[str] = []
        with (
            server_of(plain, generate=bad_for(1, times, output_ids=[1])) as server,
            opened(tiny_drafter, tmp_path, {"urls": [server.url]}, log=logs.append) as engine,
        ):
            if ends:
                with pytest.raises(UnansweredError, match="request r1: the server's answer was cut after 1 of 3"):
                    list(engine.generate(REQUESTS))
            else:
                assert len(list(engine.generate(REQUESTS))) == 4
            assert engine.repeated == 2
        assert sum("asked for again: request r1" in line for line in logs) == 2


def test_a_new_bound_holds_from_the_first_request_on(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """A turn of a speed measurement that began with the last one's requests in flight would measure that."""
    with (
        server_of(plain, generate=lambda p: answer(p, delay_s=0.0 if is_probe(p) else 0.3)) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url]}) as engine,
    ):
        for bound in (1, 8, 1, 8):
            engine.set_concurrency(bound)
            server.most_at_once = 0
            assert len(list(engine.generate(MANY[:bound]))) == bound
            assert server.most_at_once == bound


@pytest.mark.parametrize(
    ("refusal", "repeated", "was_full"),
    [(Refusal(500, "out of memory"), 1, False), (Refusal(429, "later"), 0, True), (None, 0, False)],
)
def test_the_engine_counts_what_it_had_to_repeat_and_says_that_a_server_was_full(
    refusal: Refusal | None,
    repeated: int,
    was_full: bool,
    plain: Expected,
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
) -> None:
    left = [refusal] if refusal else []

    def generate(payload: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(payload) and left:
            raise left.pop()
        return answer(payload)

    with (
        server_of(plain, generate=generate) as server,
        opened(tiny_drafter, tmp_path, {"urls": [server.url]}) as engine,
    ):
        assert (engine.repeated, engine.was_full) == (0, False)
        assert len(list(engine.generate(REQUESTS))) == 4
        assert (engine.repeated, engine.was_full) == (repeated, was_full)


def test_a_stage_that_waits_for_an_answer_reacts_to_a_stop_within_seconds(
    plain: Expected, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    stop = threading.Event()

    def hangs(payload: dict[str, Any]) -> dict[str, Any]:
        if not is_probe(payload) and payload["input_ids"] == REQUESTS[3].prompt_ids:
            stop.set()
            time.sleep(60)
        return answer(payload)

    got = []
    begun = time.monotonic()
    with (
        server_of(plain, generate=hangs) as server,
        pytest.raises(StageInterrupted),
        opened(tiny_drafter, tmp_path, {"urls": [server.url]}, check=lambda: interrupted(stop)) as engine,
    ):
        for each in engine.generate(REQUESTS):
            got.append(each.request.request_id)
    assert time.monotonic() - begun < 20
    assert sorted(got) == ["r0", "r1", "r2"]


def test_a_stage_that_waits_for_a_server_to_start_reacts_to_a_stop_within_seconds(
    tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    stop = threading.Event()
    threading.Timer(1.5, stop.set).start()
    mute = {"environment": {"PYTHONPATH": str(STAND_IN), "STAND_IN": "mute"}, "start_timeout_s": 600}
    begun = time.monotonic()
    with (
        pytest.raises(StageInterrupted),
        opened(tiny_drafter, tmp_path, {"launch": mute, "python": sys.executable}, check=lambda: interrupted(stop)),
    ):
        raise AssertionError("it must not open")
    assert time.monotonic() - begun < 30


def interrupted(stop: threading.Event) -> None:
    if stop.is_set():
        raise StageInterrupted("asked to stop")
