"""The handshake: which servers are accepted, which are refused and with what words."""

from __future__ import annotations

import asyncio
import json
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
from draftsmith.stages.engines.config import SGLangEngineConfig, TreeConfig
from draftsmith.stages.engines.sglang.expected import Expected
from draftsmith.stages.engines.sglang.handshake import Facts, shake_hands
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


class Led(httpx.AsyncHTTPTransport):
    """The network where another machine's address leads to a server of this test."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._leads_to = httpx.URL(url)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.url = request.url.copy_with(host=self._leads_to.host, port=self._leads_to.port)
        return await super().handle_async_request(request)


def shake(server: HttpServer, expected: Expected, under: str | None = None, logs: list[str] | None = None) -> Facts:
    """under: the server's address, which leads to it."""

    async def run() -> Facts:
        async with httpx.AsyncClient(trust_env=False, transport=Led(server.url)) as client:
            return await shake_hands(client, under or server.url, expected, (logs if logs is not None else []).append)

    return asyncio.run(run())


@pytest.mark.parametrize("names", [("model_info", "server_info"), OLD], ids=["new names", "old names"])
def test_the_right_server_is_accepted(names: tuple[str, str], plain: Expected) -> None:
    with server_of(plain, names=names) as server:
        facts = shake(server, plain)
    assert facts == Facts("0.5.20", None, records_trace=False, start=facts.start, remarks=[])


def test_records_of_this_drafter_are_trusted(assisted: Expected) -> None:
    with server_of(assisted, digest=assisted.drafter_digest) as server:
        facts = shake(server, assisted)
    assert (facts.records_trace, facts.algorithm, facts.greedy_only) == (True, "DFLASH", False)


def test_without_the_plug_in_nothing_is_recorded(assisted: Expected) -> None:
    with server_of(assisted) as server:
        assert not shake(server, assisted).records_trace
    with server_of(assisted, digest=assisted.drafter_digest) as server:
        assert not shake(server, replace(assisted, trace=False)).records_trace
        assert "custom_params" not in server.asked[-1][1]["sampling_params"]


def test_a_speculating_server_may_roll_out_plainly(plain: Expected, assisted: Expected) -> None:
    with server_of(plain, server=good_server(assisted), generate=speculating) as server:
        facts = shake(server, plain)
    assert ["lossless" in remark for remark in facts.remarks] == [True]
    lossy = good_server(assisted) | {"speculative_accept_threshold_single": 0.9}
    with (
        server_of(plain, server=lossy, generate=speculating) as server,
        pytest.raises(DraftsmithError, match=r"keeps proposals that the target would not \(--speculative-accept"),
    ):
        shake(server, plain)


@pytest.mark.parametrize("option", ["speculative_use_rejection_sampling", "speculative_use_block_verification"])
def test_a_server_whose_sampled_steps_are_not_replays_says_so(option: str, assisted: Expected) -> None:
    for given in (True, False):
        with server_of(assisted, server={option: given}) as server:
            remarks = shake(server, assisted).remarks
        assert [f"--{option.replace('_', '-')}: sampled answers" in remark for remark in remarks] == [True] * given


@pytest.mark.parametrize(
    ("option", "given"),
    [
        ("draft_window_size", 512), ("token_map", "hot.pt"), ("adaptive", True), ("draft_model_quantization", "fp8"),
    ],
)  # fmt: skip
def test_a_server_that_drafts_otherwise_than_the_checkpoint_says_so(
    option: str, given: Any, assisted: Expected
) -> None:
    """Its digest, its block and its answers are right: without a word only mining would find it, after the rollout."""
    for value in (given, None):
        with server_of(assisted, server={f"speculative_{option}": value}) as server:
            remarks = shake(server, assisted).remarks
        told = f"drafts with --speculative-{option.replace('_', '-')} {given}: its verify steps are not those of replay"
        assert [told in remark for remark in remarks] == [True] * (value is not None)


def test_a_release_that_was_never_tested_is_told_of_running_servers_too(plain: Expected) -> None:
    for version, told in (("0.5.23", []), ("0.5.24.dev3", ["0.5.24.dev3"]), (None, ["None"])):
        with server_of(plain, server={"version": version}) as server:
            remarks = shake(server, plain).remarks
        assert remarks == [f"{server.url} is sglang {it}, outside the tested >=0.5.20,<0.5.24" for it in told]


def test_what_cannot_be_compared_is_said(plain: Expected) -> None:
    with server_of(plain, model={"model_path": "/on/another/machine"}) as server:
        remarks = shake(server, plain).remarks
    assert len(remarks) == 1
    assert "/on/another/machine" in remarks[0]


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
        ({"server": {"speculative_num_draft_tokens": 5}}, "blocks of 5, drafting.block_size means 8"),
        ({"server": {"speculative_eagle_topk": 4}}, "drafts with --speculative-eagle-topk 4; start it with 1"),
        ({"digest": "0" * 64}, "records the drafter 000000000000, not"),
        ({"digest": ""}, "records the drafter without a digest"),
        ({"generate": answer}, "spec_verify_ct"),
    ],
)
def test_a_wrong_drafter_is_one_clear_error(wrong: dict[str, Any], what: str, assisted: Expected) -> None:
    with server_of(assisted, **wrong) as server, pytest.raises(DraftsmithError, match=what):
        shake(server, assisted)


def test_another_model_on_this_machine_is_found_by_its_weights(plain: Expected, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in plain.model_folder.iterdir():
        if file.is_file():
            (copy / file.name).write_bytes(file.read_bytes())
    with server_of(plain, model={"model_path": str(copy)}) as server:
        assert shake(server, plain).remarks == []  # the same bytes elsewhere are the same model
        weights = bytearray((copy / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (copy / "model.safetensors").write_bytes(weights)
        with pytest.raises(DraftsmithError, match="config or weights differ from the target"):
            shake(server, plain)


def test_another_drafter_on_this_machine_is_found_by_its_weights(assisted: Expected, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    elsewhere = {"speculative_draft_model_path": str(tmp_path)}
    with (
        server_of(assisted, server=elsewhere) as server,
        pytest.raises(DraftsmithError, match="which is not the drafter"),
    ):
        shake(server, assisted)


def test_a_folder_of_another_machine_is_not_looked_for_here(
    assisted: Expected, plain: Expected, tmp_path: Path
) -> None:
    """gpu2 has a drafter and a model under the same paths: whichever lie here say nothing of them."""
    (tmp_path / "config.json").write_text("{}")
    drafts = {"speculative_draft_model_path": str(tmp_path)}
    with server_of(assisted, server=drafts, digest=assisted.drafter_digest) as server:
        facts = shake(server, assisted, "http://gpu2.invalid:30000")
        assert facts.records_trace
    assert any(f"drafts with {tmp_path}, which cannot be read on this machine" in remark for remark in facts.remarks)
    with server_of(plain) as server:
        (remark,) = shake(server, plain, "http://gpu2.invalid:30000").remarks
    assert "could not be compared with the target's" in remark


@pytest.mark.parametrize("given", [dict, json.dumps])
def test_what_a_server_prefers_must_be_what_requests_can_settle(given: Any, plain: Expected) -> None:
    settled = {"top_k": 20, "repetition_penalty": 1.05, "presence_penalty": 1.5, "regex": None, "stop": None}
    with server_of(plain, model={"preferred_sampling_params": given(settled)}) as server:
        assert shake(server, plain).remarks == []
    for name, value in {"stop": ["END"], "logit_bias": {"5": -1.0}, "beam_width": 4, "custom_params": {"a": 1}}.items():
        with (
            server_of(plain, model={"preferred_sampling_params": given(settled | {name: value})}) as server,
            pytest.raises(DraftsmithError, match=rf"\({name}\); start it without --preferred-sampling-params"),
        ):
            shake(server, plain)


@pytest.mark.parametrize("option", ["default_enabled", "enforce_all"])
def test_a_server_that_draws_by_a_watermarks_key_is_refused(option: str, plain: Expected) -> None:
    with server_of(plain, server={"enable_watermark": True, "watermark_key": None}) as server:
        shake(server, plain)  # requests do not ask for one
    with (
        server_of(plain, server={f"watermark_{option}": True}) as server,
        pytest.raises(DraftsmithError, match=rf"a watermark on sampled answers \({option} of --watermark-config\)"),
    ):
        shake(server, plain)


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


def test_a_server_of_trees_must_draft_the_trees_that_were_asked_for(assisted: Expected) -> None:
    trees = replace(assisted, tree=TreeConfig(branches=4, draft_tokens=16), trace=False)
    asked = {"speculative_num_draft_tokens": 16, "speculative_eagle_topk": 4}
    with server_of(trees, server=asked) as server:
        assert not shake(server, trees).records_trace
    for wrong, what in (
        ({"speculative_eagle_topk": 2}, "start it with 4"),
        ({"speculative_num_draft_tokens": 8}, "16"),
    ):
        with server_of(trees, server=asked | wrong) as server, pytest.raises(DraftsmithError, match=what):
            shake(server, trees)
