"""Completions from vLLM's responses: anchors like the embedded engine's steps, and answers that are skipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.engines.servers.api import BadAnswerError
from draftsmith.stages.engines.servers.http import ServerAnswer
from draftsmith.stages.engines.vllm.records import (
    UnreadStepsError,
    completion_payload,
    read_completion,
    read_steps,
)
from draftsmith.stages.targets.info import TargetInfo
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import Bench, step_rows

REQUEST = Request("p/0", [10, 11, 12], 6)
EOS = (2, 0)


def metrics(accepted: list[int], width: int = 3, drafted: list[int] | None = None) -> dict[str, Any]:
    return {
        "num_spec_steps": len(accepted), "num_spec_tokens": width, "acceptance_histogram": [0] * (width + 1),
        "per_step_accepted": accepted, "per_step_drafted": drafted or [width] * len(accepted),
    }  # fmt: skip


def body(tokens: list[int], *, reason: str | None = "length", steps: Any = None, **choice: Any) -> dict[str, Any]:
    first = {"token_ids": tokens, "prompt_token_ids": [10, 11, 12], "finish_reason": reason, "stop_reason": None}
    return {"choices": [first | choice], "metrics": steps and {"speculative_decoding": steps}}


def read(answer: dict[str, Any], request: Request = REQUEST) -> Completion:
    target = TargetInfo.model_construct(eos_ids=list(EOS), vocab_size=900)
    return read_completion(request, ServerAnswer(answer), target)


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 23])
def test_prefix_sums_are_the_anchors_of_the_embedded_engine(length: int, bench: Bench) -> None:
    """The numbers of a longer answer's steps, which a server reports uncut, and the tokens of the shorter one."""
    long = bench.answers(bench.requests(12, 60), "trained")
    short = bench.answers(bench.requests(12, length), "trained")
    width = bench.drafters["trained"].block_size - 1
    compared = 0
    for name, expected in short.items():
        anchors = {
            anchor: accepted for anchor, accepted, _ in step_rows(long[name].steps)[:-1]
        }  # the last was cut by the end
        rows = step_rows(expected.steps)
        if {anchor for anchor, _, _ in rows} <= anchors.keys():
            reported = metrics([anchors[anchor] for anchor, _, _ in rows], width)
            steps = read_steps(expected.request, expected.response_ids, reported)
            assert step_rows(steps) == [(anchor, accepted, []) for anchor, accepted, _ in rows]
            compared += 1
    assert compared >= 10


def test_a_completion_has_the_number_of_steps_and_its_end() -> None:
    done = read(body([20, 21, 2], reason="stop", steps=metrics([3, 0])))
    assert (done.response_ids, done.finish_reason, done.verify_steps, done.steps) == ([20, 21, 2], "stop", 2, None)
    assert read(body([20, 21, 22, 23, 24, 25])).verify_steps == 0  # a server without a drafter


@pytest.mark.parametrize(
    ("accepted", "drafted", "reason"),
    [
        ([1], None, "preempted"),
        ([1, 1, 0, 1], None, "more tokens"),
        ([1, 2], [3, 2], "adaptive width"),
        ([0, 3], [1, 3], "adaptive width"),
    ],
)
def test_steps_that_are_not_those_of_whole_blocks_are_left_out(
    accepted: list[int], drafted: list[int] | None, reason: str
) -> None:
    tokens = [20, 21, 22, 23, 24, 25, 26]
    with pytest.raises(UnreadStepsError, match=reason):
        read_steps(REQUEST, tokens[:6], metrics(accepted, drafted=drafted))


def test_a_block_that_ends_where_the_answer_ends_is_whole() -> None:
    steps = read_steps(REQUEST, [20, 21, 22, 23, 24, 25], metrics([2, 1], drafted=[3, 2]))
    assert step_rows(steps) == [(3, 2, []), (6, 1, [])]


def test_steps_that_are_only_counted_are_left_out() -> None:
    summary = {name: value for name, value in metrics([2, 1]).items() if not name.startswith("per_step")}
    with pytest.raises(UnreadStepsError, match="detailed"):
        read_steps(REQUEST, [20, 21, 22, 23, 24, 25], summary)


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (body([20, 21], reason="abort"), "ended by 'abort'"),
        (body([20, 21]), "was cut after 2 of 6 tokens"),
        (body([20, 21], reason=None), "a chunk of a streamed answer"),
        ({"choices": []}, "a chunk of a streamed answer"),
        ({"choices": body([20])["choices"] * 2}, r"n > 1"),
        (body([20, 21], token_ids=None), "return_token_ids"),
        (body([20, 2], reason="stop", stop_reason="\n"), "not by its last token"),
        (body([20] * 6, prompt_token_ids=[10]), "saw 1 prompt tokens; 3 were sent"),
        ({}, "has no 'choices'"),
    ],
)
def test_an_answer_that_is_not_whole_is_refused(answer: dict[str, Any], what: str) -> None:
    with pytest.raises(BadAnswerError, match=f"request p/0: .*{what}"):
        read(answer)


def test_a_request_states_everything_that_decides_a_token() -> None:
    greedy = completion_payload(REQUEST, EOS)
    assert (greedy["prompt"], greedy["max_tokens"], greedy["temperature"]) == ([10, 11, 12], 6, 0.0)
    assert greedy["stop_token_ids"] == [2, 0] and greedy["return_token_ids"] is True and "seed" not in greedy
    sampled = completion_payload(replace(REQUEST, sampling=SamplingParams(0.7, 0.9, 20), seed=5), EOS)
    assert [sampled[name] for name in ("temperature", "top_p", "top_k", "seed")] == [0.7, 0.9, 20, 5]
    assert {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_p", "n"} <= greedy.keys()
