"""The engine on stand-ins of vLLM's servers: handshake, requests, and answers without steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.checkpoint_format import is_speculators
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.config import Options, VLLMEngineConfig
from draftsmith.stages.engines.registry import identify
from draftsmith.stages.engines.servers.identity import own_logprobs
from draftsmith.stages.engines.servers.requirements import ServerRequirements, served_block_size
from draftsmith.stages.engines.vllm.handshake import check_server
from draftsmith.stages.engines.vllm.server import server_command
from tests.stages.bench import step_rows
from tests.stages.engines.http_server import HttpServer, serving
from tests.stages.engines.stand_ins import Opened, with_client
from tests.stages.engines.stand_ins import check as check_sglang
from tests.stages.engines.stand_ins import server_of as sglang_server_of

REQUESTS = [Request(f"r{i}", [10 * i + 5], 8) for i in range(6)]


def completion(payload: dict[str, Any], accepted: list[int] | None = None) -> dict[str, Any]:
    """Return a good answer, which counts on from the prompt's last token. accepted: proposals of each verify step."""
    count, start = payload["max_tokens"], payload["prompt"][-1] + 1
    choice: dict[str, Any] = {
        "token_ids": [token % 800 for token in range(start, start + count)],
        "prompt_token_ids": payload["prompt"],
        "finish_reason": "length",
        "stop_reason": None,
    }
    steps = accepted and {
        "num_spec_steps": len(accepted), "num_spec_tokens": 7, "acceptance_histogram": [0] * 8,
        "per_step_accepted": accepted, "per_step_drafted": [7] * len(accepted),
    }  # fmt: skip
    return {"choices": [choice], "metrics": steps and {"speculative_decoding": steps}}


def drafting(payload: dict[str, Any]) -> dict[str, Any]:
    """Return an answer of 8 tokens in two steps."""
    return completion(payload, [2, 7] if payload["max_tokens"] == 8 else [])


def narrower(payload: dict[str, Any]) -> dict[str, Any]:
    """Return an answer with three proposals a step."""
    answer = drafting(payload)
    if answer["metrics"]:
        answer["metrics"]["speculative_decoding"]["num_spec_tokens"] = 3
    return answer


@contextmanager
def server_of(required: ServerRequirements, reply: Any = completion, **replies: Any) -> Iterator[HttpServer]:
    """Run a server that meets the requirements but for some replies."""
    card = {"id": "m", "owned_by": "vllm", "root": str(required.model_folder), "max_model_len": 512}
    good: dict[str, Any] = {
        "version": lambda _: {"version": "0.32.0"},
        "v1/models": lambda _: {"data": [card]},
        "tokenize": lambda _: {"tokens": required.probe_ids},
        "v1/completions": reply,
        "health": lambda _: {},
    }
    with serving(lambda _: {}, **good | replies) as running:
        yield running


def on(server: HttpServer) -> dict[str, Any]:
    return {"kind": "vllm", "urls": [server.url], "concurrency": 4}


def test_answers_and_their_anchors(assisted: ServerRequirements, opened: Opened) -> None:
    with (
        server_of(assisted, drafting) as server,
        opened(on(server), drafter=assisted.drafter_folder) as engine,
    ):
        assert (engine.name, engine.records_trace) == ("vllm 0.32.0", True)
        answers = list(engine.generate(REQUESTS))
        sent = {payload.get("cache_salt") for path, payload in server.asked if path == "/v1/completions"}
        engine.flush_cache()
        list(engine.generate(REQUESTS))
        assert sent == {None} and server.asked[-1][1]["cache_salt"]
    assert [step_rows(each.steps) for each in answers] == [[(1, 2, []), (4, 4, [])]] * 6
    assert {each.verify_steps for each in answers} == {2} and {each.retractions for each in answers} == {0}


def test_steps_that_do_not_fit_are_left_out_and_the_answer_is_used(
    assisted: ServerRequirements, opened: Opened
) -> None:
    def preempted(payload: dict[str, Any]) -> dict[str, Any]:
        return completion(payload, [2, 1] if payload["prompt"] == [5] else [2, 7])

    logs: list[str] = []
    with (
        server_of(assisted, preempted) as server,
        opened(on(server), drafter=assisted.drafter_folder, log=logs.append) as engine,
    ):
        answers = {each.request.request_id: each for each in engine.generate(REQUESTS)}
    assert len(answers) == len(REQUESTS) and answers["r0"].steps is None and answers["r0"].retractions == 1
    assert all(each.steps for name, each in answers.items() if name != "r0")
    assert sum("preempted" in line for line in logs) == 1


@pytest.mark.parametrize(
    ("replies", "kind", "what"),
    [
        ({"version": lambda _: {"version": "0.28.1"}}, DraftsmithError, "reports no verify steps. Use 0.29"),
        ({"tokenize": lambda _: {"tokens": [1]}}, DraftsmithError, "whose tokenizer is not that of the target"),
        ({"v1/models": lambda _: {"data": [{"id": "m", "max_model_len": 64}]}}, DraftsmithError, "--max-model-len"),
        ({"v1/completions": completion}, DraftsmithError, "--per-request-spec-decode-metrics detailed"),
        ({"v1/completions": narrower}, DraftsmithError, r"drafts 3 tokens per step, drafting\.block_size means 7"),
        ({"version": lambda _: None}, RetryableError, "Check that the server runs"),
    ],
)
def test_servers_of_something_else_are_refused(
    replies: dict[str, Any], kind: type[DraftsmithError], what: str, assisted: ServerRequirements, opened: Opened
) -> None:
    with (
        server_of(assisted, drafting, **replies) as server,
        pytest.raises(kind, match=what),
        opened(on(server), drafter=assisted.drafter_folder),
    ):
        pass


@pytest.mark.parametrize("known_by", ["metrics", "development mode", "options"])
def test_a_cache_of_another_dtype_is_measured(plain: ServerRequirements, known_by: str) -> None:
    """A stock server reports its cache in its metrics, among other labels."""
    scores = own_logprobs(plain.target_folder, plain.scored_ids, print)
    vllm_config = {
        "model_config": {"dtype": "torch.float32", "quantization": None}, "cache_config": {"cache_dtype": "fp8"}
    }  # fmt: skip
    replies: dict[str, dict[str, Any]] = {
        "metrics": {
            "metrics": lambda _: '# HELP\nvllm:cache_config_info{a="1",cache_dtype="fp8",mamba_cache_dtype="auto"} 1'
        },
        "development mode": {"server_info?config_format=json": lambda _: {"vllm_config": vllm_config}},
    }

    def scored(payload: dict[str, Any]) -> dict[str, Any]:
        done = completion(payload)
        if "prompt_logprobs" in payload:
            pairs = zip(payload["prompt"][1:], scores, strict=True)
            done["choices"][0]["prompt_logprobs"] = [None, *({str(t): {"logprob": p + 0.2}} for t, p in pairs)]
        return done

    ours = known_by == "options"
    options: Options | None = {"kv_cache_dtype": "fp8"} if ours else None

    with server_of(plain, scored, **replies.get(known_by, {})) as server:
        checked = with_client(lambda c: check_server(c, server.url, plain, print, ours=ours, options=options))
    found = checked.target_difference
    assert found is not None and found.settings == ["kv_cache_dtype fp8"] and found.mean == pytest.approx(0.2, rel=1e-3)


def test_the_engine_of_an_address_is_found(plain: ServerRequirements, assisted: ServerRequirements) -> None:
    with server_of(assisted, drafting) as server:
        engine, block = identify(server.url, None)
        assert (engine.kind, block) == ("vllm", 8)
    with server_of(plain) as server:
        assert identify(server.url, None)[1] is None
    with sglang_server_of(assisted) as server:
        engine, block = identify(server.url, None)
        assert (engine.kind, block) == ("sglang", 8)
        check_sglang(server, assisted, ours=True)


def config(python: Path, **launch: Any) -> VLLMEngineConfig:
    return VLLMEngineConfig.model_validate({"kind": "vllm", "python": python, "launch": launch})


def test_the_command_of_a_server_names_an_exported_drafter(
    assisted: ServerRequirements, plain: ServerRequirements, tmp_path: Path
) -> None:
    (python := tmp_path / "python").touch()
    options = {"max-num-batched-tokens": 4096, "enforce-eager": True, "async-scheduling": False}
    words = server_command(config(python, tensor_parallel=2, options=options), assisted, tmp_path / "drafter")
    speculative = json.loads(words[words.index("--speculative-config") + 1])
    assert speculative == {"model": str(tmp_path / "drafter"), "method": "dflash", "num_speculative_tokens": 7}
    assert is_speculators(tmp_path / "drafter")
    assert served_block_size(tmp_path / "drafter", DraftingConfig(), "DFLASH") == 8
    assert words[words.index("--per-request-spec-decode-metrics") + 1] == "detailed"
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert words[-3:] == ["--max-num-batched-tokens", "4096", "--enforce-eager"]
    assert "--speculative-config" not in server_command(config(python), plain, tmp_path / "none")


@pytest.mark.parametrize(
    "option", ["speculative-config", "spec", "gpu-memory-utilization", "api-key", "config", "dtype"]
)
def test_options_that_a_field_sets_are_refused(option: str) -> None:
    with pytest.raises(ValidationError, match=r"is set by|looks like a secret|would read it"):
        config(Path("python"), options={option: "x"})
