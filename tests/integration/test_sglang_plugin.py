"""The plug-in in a real server: every verify step of requests with a trace, checked against transformers."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from draftsmith.stages.drafters.digest import drafter_digest
from draftsmith.stages.engines.sglang.protocol import KEY, REQUESTS_STATE, SWAP_STATE
from draftsmith.stages.engines.sglang.releases import SUPPORTED
from tests.integration.recorded import Answer, Reference, asked_for_nothing, body
from tests.sglang_cpu.fixtures import ServingTarget
from tests.sglang_cpu.options import CPU_ENVIRONMENT
from tests.sglang_cpu.server import generate, running_server

pytestmark = [pytest.mark.sglang, pytest.mark.integration]


@pytest.fixture(scope="module")
def reference(serving_target: ServingTarget) -> Reference:
    return Reference(serving_target.model)


def last_chunk(url: str, request: Answer) -> Answer:
    """The last piece of a streamed answer: SGLang repeats in it all that came before."""
    pieces: list[Answer] = []
    with httpx.stream("POST", f"{url}/generate", json={**request, "stream": True}, timeout=300) as response:
        for line in response.iter_lines():
            if line.startswith("data:") and "[DONE]" not in line:
                pieces.append(json.loads(line[5:]))
    assert len(pieces) > 1  # it was streamed
    return pieces[-1]


@pytest.fixture(scope="module")
def digest(serving_target: ServingTarget) -> str:
    return drafter_digest(serving_target.drafter)


def test_requests_of_one_batch_ask_each_for_itself(dflash_url: str, reference: Reference, digest: str) -> None:
    """Streamed and not, of different lengths, so that batches shrink while they run."""
    prompts = reference.prompts

    def ask(number: int) -> Answer:
        request = body(prompts[number], trace=number % 3 != 0, max_new_tokens=7 + 2 * number)
        if number % 2:
            return last_chunk(dflash_url, request)
        return generate(dflash_url, [request])[0]

    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(ask, range(len(prompts))))
    accepted: Counter[int] = Counter()
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if number % 3 == 0:
            assert asked_for_nothing(answer)
        else:
            accepted += reference.check(prompt, answer, digest)
    assert {0, 7} <= accepted.keys() and len(accepted) > 4  # nothing, parts and whole blocks were kept


def test_a_server_without_a_drafter_answers_as_ever(plain_url: str, reference: Reference) -> None:
    answer = generate(plain_url, [body(reference.prompts[0])])[0]
    assert len(answer["output_ids"]) == 48 and KEY not in answer["meta_info"]


def test_a_drafting_server_reports_that_it_computes_48_requests_at_a_time(dflash_url: str) -> None:
    """Unless it gets --max-running-requests; the handshake reads what it reports."""
    states = httpx.get(f"{dflash_url}/server_info", timeout=60).json()["internal_states"]
    assert [state["effective_max_running_requests_per_dp"] for state in states] == [48]


@pytest.fixture(scope="module")
def busy_url(sglang_env: Path, serving_target: ServingTarget, sglang_logs: Path) -> Iterator[str]:
    """Overlapped scheduling (the default on a GPU), prompts in chunks, retracted requests, a trace of all."""
    options = {"disable-overlap-schedule": False, "chunked-prefill-size": 16}
    environment = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7", "DRAFTSMITH_TRACE": "1"}
    served, log = serving_target, sglang_logs / "busy.log"
    with running_server(
        sglang_env, served.model, served.drafter, options=options, log=log, environment=environment
    ) as url:
        yield url


def test_overlap_chunks_and_retractions_lose_nothing(busy_url: str, reference: Reference, digest: str) -> None:
    prompts = reference.prompts
    assert max(len(prompt) for prompt in prompts) > 16  # prefilled in chunks
    requests = [body(prompt, trace=False, max_new_tokens=30 + 2 * i) for i, prompt in enumerate(prompts)]
    answers = generate(busy_url, requests, concurrency=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        reference.check(prompt, answer, digest)
    assert sum(answer["meta_info"]["num_retractions"] for answer in answers) > 0
    (state,) = httpx.get(f"{busy_url}/server_info", timeout=60).json()["internal_states"]
    if SWAP_STATE not in state:  # 0.5.20 has neither swaps nor sums
        assert REQUESTS_STATE not in state
        return
    recorded = []
    for answer in answers:
        output, steps = answer["output_ids"], answer["meta_info"][KEY]
        committed = [min(step["accepted"] + 1, len(output) - at) for at, step in enumerate(steps) if at and step]
        recorded.append([sum(committed), len(committed)])
    kept = [sums["depth:below-1k"] for _, sums in state[REQUESTS_STATE][digest]]
    assert sorted(kept) == sorted(recorded), "the sums of their steps"


def test_sglang_ends_where_a_hook_is_missing(sglang_env: Path) -> None:
    """SGLang's own loader would log an error of a plug-in and go on without it."""
    program = (
        "from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2\n"
        "del DFlashWorkerV2._accept_block\n"
        "from sglang.srt.plugins import load_plugins\n"
        "load_plugins()\n"
    )
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        [str(sglang_env), "-c", program],
        env={**inherited, **CPU_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 1
    assert "DFlashWorkerV2._accept_block is missing" in ended.stderr
    assert f"It supports {SUPPORTED}" in ended.stderr
