"""The handshake: servers that are accepted, and errors for those that are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.servers.api import ServerInfo
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.engines.http_server import Refusal, answer
from tests.stages.engines.stand_ins import (
    EngineOn,
    check,
    good_server,
    requirements_of,
    server_of,
    speculating,
)
from tests.testbed.drafter import DrafterArtifacts


def test_the_right_server_is_accepted(plain: ServerRequirements) -> None:
    with server_of(plain) as server:
        assert check(server, plain, ours=True) == ServerInfo("0.5.20", records_trace=False)
        (remark,) = check(server, plain).remarks
    assert "no log-probs" in remark


def test_records_of_this_drafter_are_trusted(assisted: ServerRequirements) -> None:
    with server_of(assisted, digest=assisted.drafter_digest) as server:
        info = check(server, assisted)
    assert (info.records_trace, info.greedy_only) == (True, False)
    assert not any("plug-in" in remark for remark in info.remarks)


def test_without_the_plug_in_nothing_is_recorded(assisted: ServerRequirements) -> None:
    with server_of(assisted) as server:
        info = check(server, assisted)
        assert not info.records_trace and any("plug-in" in remark for remark in info.remarks)


def test_a_server_that_drafts_may_answer_for_the_target_alone(
    plain: ServerRequirements, assisted: ServerRequirements
) -> None:
    with server_of(plain, server=good_server(assisted), generate=speculating) as server:
        info = check(server, plain)
    assert any("lossless" in remark for remark in info.remarks)
    lossy = good_server(assisted) | {"speculative_accept_threshold_single": 0.9}
    with (
        server_of(plain, server=lossy, generate=speculating) as server,
        pytest.raises(DraftsmithError, match=r"accepts proposals that the target would reject \(--speculative-accept"),
    ):
        check(server, plain)


def test_an_untested_release_of_a_running_server_is_a_remark(plain: ServerRequirements) -> None:
    for version, told in (("0.5.23", []), ("0.5.24.dev3", ["0.5.24.dev3"]), (None, ["None"])):
        with server_of(plain, server={"version": version}) as server:
            remarks = check(server, plain, ours=True).remarks
        assert remarks == [f"{server.url} is sglang {it}, outside the tested >=0.5.20,<0.5.24" for it in told]


def test_requests_that_would_wait_in_the_server_are_a_remark_and_in_an_evaluation_an_error(
    plain: ServerRequirements,
) -> None:
    states = [{"effective_max_running_requests_per_dp": limit} for limit in (64, 48)]
    with server_of(plain, server={"internal_states": states}) as server:
        assert check(server, replace(plain, concurrency=48), ours=True).remarks == []
        (remark,) = check(server, replace(plain, concurrency=64), ours=True).remarks
        assert "48 requests at a time of 64" in remark
        with pytest.raises(DraftsmithError, match="48 requests at a time of 64"):
            check(server, replace(plain, concurrency=64, measure_first_token=True), ours=True)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"tokens": [1, 2, 3]}, "tokenizer is not that of the target"),
        ({"server": {"max_req_input_len": 100}}, "takes 104 positions per request, the longest needs 200"),
        ({"server": {"max_total_num_tokens": 150}}, "takes 148 positions"),
        ({"generate": lambda p: answer(p | {"input_ids": [895]})}, "another model is served"),
    ],
)
def test_a_wrong_server_is_one_clear_error(wrong: dict[str, Any], what: str, plain: ServerRequirements) -> None:
    with server_of(plain, **wrong) as server, pytest.raises(DraftsmithError, match=what) as caught:
        check(server, plain)
    assert not isinstance(caught.value, RetryableError)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"server": {"speculative_algorithm": None}}, "without a drafter"),
        ({"server": {"speculative_algorithm": "EAGLE3"}}, "drafts by EAGLE3"),
        ({"server": {"speculative_num_draft_tokens": 5}}, "blocks of 5, drafting.block_size means 8"),
        ({"server": {"speculative_eagle_topk": 4}}, "drafts with --speculative-eagle-topk 4"),
        ({"digest": "0" * 64}, "drafts with 000000000000, not"),
        ({"digest": ""}, "a drafter without a digest"),
        ({"generate": answer}, "spec_verify_ct"),
    ],
)
def test_a_wrong_drafter_is_one_clear_error(wrong: dict[str, Any], what: str, assisted: ServerRequirements) -> None:
    with server_of(assisted, **wrong) as server, pytest.raises(DraftsmithError, match=what):
        check(server, assisted)


@pytest.mark.parametrize("known", [False, True])
def test_a_native_head_is_reported_as_eagle_and_may_be_the_targets_own(
    known: bool, assisted: ServerRequirements
) -> None:
    """A server that reads it from the target's folder has no digest of it, and records it all the same."""
    required, told = replace(assisted, algorithm="NEXTN"), {"speculative_algorithm": "EAGLE"}
    with server_of(required, server=told, digest=assisted.drafter_digest if known else "") as server:
        assert check(server, required).records_trace
    with (
        server_of(required, server=told, digest="0" * 64) as server,
        pytest.raises(DraftsmithError, match="drafts with 0"),
    ):
        check(server, required)


def test_a_server_error_is_retryable(plain: ServerRequirements) -> None:
    def busy(_: dict[str, Any]) -> dict[str, Any]:
        raise Refusal(503)

    with server_of(plain, generate=busy) as server, pytest.raises(RetryableError, match="status 503"):
        check(server, plain)


# ---- servers whose verification takes the argmax whatever the temperature


def greedy_after_the_first(payload: dict[str, Any], ties: int = 0) -> dict[str, Any]:
    """Answer like SGLang without a kernel that samples: the first token is sampled, verify steps take those of
    `answer`.

    ties: the first answers, of this number, differ by a near-tie.
    """
    done = speculating(payload)
    first, count = done["output_ids"][0], len(done["output_ids"])
    done["output_ids"] = list(range(first, first + count))
    if payload["sampling_params"].get("sampling_seed", ties) < ties:
        done["output_ids"][2] += 7
    return done


@pytest.mark.parametrize("ties", [0, 2])
def test_greedy_verification_is_found_by_its_tokens(ties: int, assisted: ServerRequirements) -> None:
    with server_of(assisted, generate=lambda p: greedy_after_the_first(p, ties)) as server:
        assert check(server, assisted).greedy_only


def test_a_server_that_samples_is_not_taken_for_a_greedy_one(assisted: ServerRequirements) -> None:
    with server_of(assisted, server={"device": "xpu"}) as server:
        assert not check(server, assisted).greedy_only
        temperatures = [
            payload["sampling_params"]["temperature"] for path, payload in server.asked if payload.get("input_ids")
        ]
    assert max(temperatures) >= 1e3


def test_a_server_that_drafts_on_a_cpu_is_greedy_only_without_a_probe(
    assisted: ServerRequirements, tiny_drafter: DrafterArtifacts
) -> None:
    with server_of(assisted, server={"device": "cpu"}) as server:
        assert check(server, assisted, ours=True).greedy_only
        assert server.count("/generate") == 1
    plain = requirements_of(tiny_drafter, None)
    with server_of(plain, server={"device": "cpu"}, generate=answer) as server:
        assert not check(server, plain).greedy_only


def test_a_sampled_rollout_on_such_servers_is_refused_and_a_greedy_one_is_not(
    assisted: ServerRequirements, engine_on: EngineOn
) -> None:
    with engine_on(assisted, generate=greedy_after_the_first) as (_server, engine):
        assert len(list(engine.generate([Request("greedy", [5], 3)]))) == 1
        with pytest.raises(DraftsmithError, match=r"sampling\.temperature: SGLang verifies greedily on this device"):
            list(engine.generate([Request("sampled", [5], 3, SamplingParams(1.0))]))
