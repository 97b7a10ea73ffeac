"""The handshake: which servers are accepted, which are refused and with what words."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.handshake import ServerInfo, check_server
from draftsmith.stages.stored import DRAFTER_FOLDER
from tests.stages.engines.http_server import HttpServer, Refusal, answer, serving
from tests.testbed.drafter import DrafterArtifacts

OLD = ("get_model_info", "get_server_info")


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, None)


@pytest.fixture
def assisted(tiny_drafter: DrafterArtifacts) -> Expected:
    return expected_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)


def expected_of(made: DrafterArtifacts, drafter: Path | None) -> Expected:
    return Expected.of(
        SGLangEngineConfig.model_validate({"kind": "sglang", "urls": ["http://x"]}),
        target_folder=made.target,
        drafter_folder=drafter,
        drafting=DraftingConfig(),
        longest=200,
        stream=False,
    )


def good_model(expected: Expected) -> dict[str, Any]:
    return {
        "model_path": str(expected.model_folder),
        "is_generation": True,
        "model_type": expected.target.model_type,
        "architectures": [expected.target.architecture],
    }


def good_server(expected: Expected) -> dict[str, Any]:
    drafting = {
        "speculative_algorithm": "DFLASH",
        "speculative_draft_model_path": str(expected.drafter_folder),
        "speculative_num_draft_tokens": 8,
    }
    room = {"max_req_input_len": 1018, "max_total_num_tokens": 4096, "page_size": 1}
    return {"version": "0.5.20", "device": "cuda", **room, **(drafting if expected.drafter_folder else {})}


def speculating(payload: dict[str, Any], digest: str | None = None) -> dict[str, Any]:
    """One step whose proposals were all accepted: of the tokens that `answer` counts, or drawn from [20, 800)."""
    done = answer(payload, spec_verify_ct=1)
    sampling = payload["sampling_params"]
    if sampling["temperature"] > 0:
        drawn = random.Random(sampling["sampling_seed"])
        done["output_ids"] = [drawn.randrange(20, 800) for _ in done["output_ids"]]
    tokens, prompt = done["output_ids"], len(payload["input_ids"])
    if digest is not None and sampling.get("custom_params"):
        identity = {"v": "1", "drafter": digest}
        step = identity | {"anchor": prompt, "block": tokens[1:], "accepted": len(tokens) - 1, "bonus": 5}
        done["meta_info"]["draftsmith_trace"] = [identity, step, *[None] * (len(tokens) - 2)]
    return done


@contextmanager
def server_of(
    expected: Expected,
    *,
    model: dict[str, Any] | None = None,
    server: dict[str, Any] | None = None,
    tokens: list[int] | None = None,
    digest: str | None = None,
    names: tuple[str, str] = ("model_info", "server_info"),
    generate: Any = None,
) -> Iterator[HttpServer]:
    """The right server for `expected`, with differences."""
    if generate is None:
        generate = (lambda p: speculating(p, digest)) if expected.drafter_folder else answer
    replies = {
        names[0]: lambda _: good_model(expected) | (model or {}),
        names[1]: lambda _: good_server(expected) | (server or {}),
        "tokenize": lambda _: {"tokens": expected.probe_ids if tokens is None else tokens},
    }
    with serving(generate, **replies) as running:
        yield running


def shake(server: HttpServer, expected: Expected, *, ours: bool = False, logs: list[str] | None = None) -> ServerInfo:
    async def run() -> ServerInfo:
        async with httpx.AsyncClient(trust_env=False) as client:
            return await check_server(
                client, server.url, expected, (logs if logs is not None else []).append, ours=ours
            )

    return asyncio.run(run())


@pytest.mark.parametrize("names", [("model_info", "server_info"), OLD], ids=["new names", "old names"])
def test_the_right_server_is_accepted(names: tuple[str, str], plain: Expected) -> None:
    with server_of(plain, names=names) as server:
        assert shake(server, plain, ours=True) == ServerInfo("0.5.20", records_trace=False)
        (remark,) = shake(server, plain).remarks
    assert "no log-probs" in remark


def test_records_of_this_drafter_are_trusted(assisted: Expected) -> None:
    with server_of(assisted, digest=assisted.drafter_digest) as server:
        info = shake(server, assisted)
    assert (info.records_trace, info.greedy_only) == (True, False)
    assert not any("plug-in" in remark for remark in info.remarks)


def test_without_the_plug_in_nothing_is_recorded(assisted: Expected) -> None:
    with server_of(assisted) as server:
        info = shake(server, assisted)
        assert not info.records_trace and any("plug-in" in remark for remark in info.remarks)
    with server_of(assisted, digest=assisted.drafter_digest) as server:
        assert not shake(server, replace(assisted, trace=False)).records_trace
        assert "custom_params" not in server.asked[-1][1]["sampling_params"]


def test_a_speculating_server_may_roll_out_plainly(plain: Expected, assisted: Expected) -> None:
    with server_of(plain, server=good_server(assisted), generate=speculating) as server:
        info = shake(server, plain)
    assert any("lossless" in remark for remark in info.remarks)
    lossy = good_server(assisted) | {"speculative_accept_threshold_single": 0.9}
    with (
        server_of(plain, server=lossy, generate=speculating) as server,
        pytest.raises(DraftsmithError, match=r"keeps proposals that the target would not \(--speculative-accept"),
    ):
        shake(server, plain)


def test_a_release_that_was_never_tested_is_told_of_running_servers_too(plain: Expected) -> None:
    for version, told in (("0.5.23", []), ("0.5.24.dev3", ["0.5.24.dev3"]), (None, ["None"])):
        with server_of(plain, server={"version": version}) as server:
            remarks = shake(server, plain, ours=True).remarks
        assert remarks == [f"{server.url} is sglang {it}, outside the tested >=0.5.20,<0.5.24" for it in told]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"model": {"is_generation": False}}, "does not generate"),
        ({"model": {"model_type": "llama"}}, r"serves .*llama.*the target is .*qwen3"),
        ({"model": {"architectures": ["LlamaForCausalLM"]}}, "LlamaForCausalLM"),
        ({"tokens": [1, 2, 3]}, "tokenizer is not that of the target"),
        ({"server": {"max_req_input_len": 100}}, "room for 104 positions a request, the longest needs 200"),
        ({"server": {"max_total_num_tokens": 150}}, "room for 148 positions"),
        ({"names": ("model_info", "elsewhere")}, "has no /server_info"),
        ({"generate": lambda p: answer(p | {"input_ids": [895]})}, "another model is served"),
        ({"generate": lambda p: answer(p) | {"output_ids": []}}, "is empty"),
    ],
)
def test_a_wrong_server_is_one_clear_error(wrong: dict[str, Any], what: str, plain: Expected) -> None:
    with server_of(plain, **wrong) as server, pytest.raises(DraftsmithError, match=what) as caught:
        shake(server, plain)
    assert not isinstance(caught.value, RetryableError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"server": {"speculative_algorithm": None}}, "without a drafter: start it with"),
        ({"server": {"speculative_algorithm": "EAGLE3"}}, "drafts by EAGLE3"),
        ({"server": {"speculative_num_draft_tokens": 5}}, "blocks of 5, drafting.block_size means 8"),
        ({"server": {"speculative_eagle_topk": 4}}, "drafts with --speculative-eagle-topk 4; start it with 1"),
        ({"digest": "0" * 64}, "drafts with 000000000000, not"),
        ({"digest": ""}, "a drafter without a digest"),
        ({"generate": answer}, "spec_verify_ct"),
    ],
)
def test_a_wrong_drafter_is_one_clear_error(wrong: dict[str, Any], what: str, assisted: Expected) -> None:
    with server_of(assisted, **wrong) as server, pytest.raises(DraftsmithError, match=what):
        shake(server, assisted)


def test_a_server_in_trouble_may_be_asked_again_later(plain: Expected) -> None:
    def busy(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503)

    with server_of(plain, generate=busy) as server, pytest.raises(RetryableError, match="status 503"):
        shake(server, plain)


def test_a_server_that_streams_increments_cannot_be_timed(plain: Expected) -> None:
    with (
        server_of(plain, server={"incremental_streaming_output": True}) as server,
        pytest.raises(DraftsmithError, match="without --incremental-streaming-output"),
    ):
        shake(server, replace(plain, stream=True))
