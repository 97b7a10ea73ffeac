"""Completions from a server's answers: records cut like the embedded engine's, and refused answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.servers.http import ServerAnswer
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.records import (
    BadAnswerError,
    generate_payload,
    read_completion,
    read_steps,
    recorded_drafter,
)
from draftsmith.stages.evaluation.timed_runs import accepted_lengths
from draftsmith.stages.targets.info import TargetInfo
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import Bench, step_rows

REQUEST = Request("p/0", [10, 11, 12], 6)
EOS = (2, 0)


def record(anchor: int, block: list[int], accepted: int, bonus: int, **more: Any) -> dict[str, Any]:
    return {"v": "1", "drafter": "d", "anchor": anchor, "block": block, "accepted": accepted, "bonus": bonus, **more}


def body(
    tokens: list[int], records: list[Any] | None = None, reason: str = "length", matched: Any = None, **meta: Any
) -> dict[str, Any]:
    traced = {} if records is None else {"draftsmith_trace": records}
    finish = {"type": reason} | ({} if matched is None else {"matched": matched})
    found = {"finish_reason": finish, "prompt_tokens": 3, "spec_verify_ct": 2, **traced, **meta}
    return {"output_ids": tokens, "meta_info": found}


def read(answer: dict[str, Any], request: Request = REQUEST, with_records: bool = True) -> Completion:
    target = TargetInfo.model_construct(eos_ids=list(EOS), vocab_size=900)
    return read_completion(request, ServerAnswer(answer), target, ["d"] if with_records else [])


GOOD = [None, record(3, [21, 22, 99], 2, 23), None, None, record(6, [24, 25, 26], 3, 27), None]


def as_records(long: Completion, rows: list[tuple[int, int, list[int]]], length: int) -> list[Any]:
    """Return the plug-in's records for the first `length` tokens of a longer answer, with these uncut steps."""
    elements: list[Any] = [{"v": "1", "drafter": "d"}] + [None] * (length - 1)
    prompt = len(long.request.prompt_ids)
    for anchor, accepted, proposed in rows:
        at = anchor - prompt + 1
        if at < length:
            elements[at] = record(anchor, proposed, accepted, long.response_ids[at + accepted])
    return elements


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 23])
def test_cut_records_equal_the_embedded_engines_steps(length: int, bench: Bench) -> None:
    """Steps of a longer answer, cut where the shorter one ends, are the steps of decoding the shorter one."""
    long = bench.answers(bench.requests(12, 60), "trained")
    short = bench.answers(bench.requests(12, length), "trained")
    compared = 0
    for name, expected in short.items():
        whole = step_rows(long[name].steps)[:-1]  # the last one was cut by the end itself
        known = whole[-1][0] + whole[-1][1] + 2 - len(expected.request.prompt_ids)
        if (size := len(expected.response_ids)) <= known:
            records = {"draftsmith_trace": as_records(long[name], whole, size)}
            steps = read_steps(expected.request, expected.response_ids, records)
            assert step_rows(steps) == step_rows(expected.steps)
            compared += 1
    assert compared >= 10


def test_a_stop_token_inside_an_accepted_block_cuts_its_step() -> None:
    records = [None, record(3, [21, 2, 23], 3, 24), None]
    done = read(body([20, 21, 2], records, "stop"))
    assert step_rows(done.steps) == [(3, 2, [21, 2, 23])]
    assert done.verify_steps == 1


@pytest.mark.parametrize("nan", [None, float("nan")])
def test_an_answer_with_nan_logits_is_a_bad_one(nan: float | None) -> None:
    """JSON has no NaN: SGLang writes null."""
    answer = body([20, 21], [None, record(3, [21, 5, 6], 1, 7, logprobs=[-0.5, nan, -2])], "length")
    with pytest.raises(BadAnswerError, match="request p/0: the server's log-probs at token 1 are NaN"):
        read(answer, _short(2))
    assert read(answer, _short(2), with_records=False).response_ids == [20, 21]


def _short(new: int) -> Request:
    return replace(REQUEST, max_new_tokens=new)


@pytest.mark.parametrize(
    ("records", "what"),
    [
        ([], "end at token 1 of 6"),
        ([*GOOD[:4], None, None], "end at token 4 of 6"),
        ([None, None, *GOOD[1:5]], "token 2 has a step"),
        ([None, record(4, [21, 22, 99], 2, 23), None, None, GOOD[4], None], "anchor 4"),
        ([None, record(3, [21, 22, 99], 1, 22), None, None, GOOD[4], None], "a step at token 3 was due"),
        ([None, record(3, [21, 77, 99], 2, 23), None, None, GOOD[4], None], "other tokens"),
        ([None, record(3, [21, 22, 99], 2, 77), None, None, GOOD[4], None], "other tokens"),
        ([*GOOD, record(8, [1, 2, 3], 0, 4)], "a step at token 6 was due|a step at token 6, after the last of 6"),
        ([None, {"v": "1", "drafter": "d", "refused": "a tree"}], "a tree"),
    ],
)
def test_records_that_do_not_cover_the_answer_are_one_clear_error(records: list[Any], what: str) -> None:
    with pytest.raises(BadAnswerError, match=what) as caught:
        read(body([20, 21, 22, 23, 24, 25], records))
    assert "request p/0" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (body([]), "is empty"),
        (body([20, 900, 1, 1, 1, 1]), "another model"),
        (body([20, 21, 22, 23, 24, 25], prompt_tokens=2), "2 prompt tokens; 3 were sent"),
        (body([20, 21], reason="stop"), "no end token"),
        (body([20, 2], reason="stop", matched="NaN happened"), "ended by 'NaN happened', not by its last token"),
        (body([20, 2], reason="stop", matched="2"), "ended by '2', not by its last token"),
        (body([20, 2], reason="stop", matched=0), "ended by 0, not by its last token"),
        (body([20, 21]), "cut after 2 of 6"),
        (body([20, 2], reason="abort"), "abort"),
        ({"output_ids": [1]}, "meta_info"),
    ],
)
def test_an_answer_that_does_not_fit_its_request_is_refused(answer: dict[str, Any], what: str) -> None:
    with pytest.raises(DraftsmithError, match=what) as caught:
        read(answer, with_records=False)
    assert "request p/0" in str(caught.value)


def test_version_and_drafter_are_read_from_the_records() -> None:
    assert recorded_drafter("r", {}) is None
    assert recorded_drafter("r", {"draftsmith_trace": [None, None]}) is None
    assert recorded_drafter("r", {"draftsmith_trace": [{"v": "1", "drafter": "abc"}]}) == "abc"
    with pytest.raises(DraftsmithError, match="records version 2, this Draftsmith reads 1"):
        recorded_drafter("r", {"draftsmith_trace": [{"v": "2", "drafter": "abc"}]})


def test_payloads_hold_sampling_and_the_request_for_records() -> None:
    sampled = replace(REQUEST, sampling=SamplingParams(0.7, 0.9, 20), seed=2**62 + 1)
    greedy = generate_payload(REQUEST, EOS, traced=False)
    assert greedy["input_ids"] == [10, 11, 12]
    asked = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": -1,
        "max_new_tokens": 6,
        "stop_token_ids": [2, 0],
        "ignore_eos": False,
    }
    assert asked.items() <= greedy["sampling_params"].items()
    # SGLang samples by {**preferred, **requested}, so every field is in the request
    names = "min_p min_new_tokens frequency_penalty presence_penalty logit_bias stop_regex regex ebnf json_schema"
    assert {*names.split(), "structural_tag"} <= greedy["sampling_params"].keys()
    assert (greedy["sampling_params"]["repetition_penalty"], greedy["sampling_params"]["stop"]) == (1.0, None)
    assert not {"custom_params", "sampling_seed"} & greedy["sampling_params"].keys()
    params = generate_payload(sampled, EOS, traced=True)["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.7, 0.9, 20)
    assert params["sampling_seed"] == 2**62 + 1
    assert params["custom_params"] == {"draftsmith_trace": True}


def test_records_of_another_drafter_are_a_bad_answer() -> None:
    answer = body([20, 21, 2], [{"v": "1", "drafter": "e" * 64}, record(3, [21, 2, 23], 3, 24), None], "stop")
    with pytest.raises(BadAnswerError, match=r"request p/0: its verify steps come from eeeeeeeeeeee, not from d"):
        read(answer)
    assert read(answer, with_records=False).steps is None


def test_only_a_native_head_may_have_no_digest() -> None:
    answer = body([20, 21, 2], [{"v": "1", "drafter": ""}, record(3, [21, 2, 23], 3, 24), None], "stop")
    target = TargetInfo.model_construct(eos_ids=list(EOS), vocab_size=900)
    required = ServerRequirements(target, Path(), Path(), [], [], 9, 1, drafter_digest="d" * 64, algorithm="DFLASH")
    with pytest.raises(BadAnswerError, match="its verify steps come from an unnamed drafter, not from d"):
        read_completion(REQUEST, ServerAnswer(answer), target, required.reported_digests)
    native = replace(required, algorithm="NEXTN")
    assert read_completion(REQUEST, ServerAnswer(answer), target, native.reported_digests).steps is not None


def test_without_records_the_servers_own_counts_are_used() -> None:
    counted = read(body([20, 21, 2], reason="stop", spec_correct_drafts_histogram=[1, 0, 2]), with_records=False)
    assert (counted.accepted_counts, counted.steps, counted.verify_steps) == ([1, 0, 2], None, 2)
    assert accepted_lengths(counted) == [0, 2, 2]
    recorded = read(body([20, 21, 22, 23, 24, 25], GOOD, spec_correct_drafts_histogram=[0, 0, 1, 1]))
    assert accepted_lengths(recorded) == [2, 2]
