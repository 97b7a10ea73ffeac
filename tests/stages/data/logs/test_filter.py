"""Whatever a row contains, the log filter accepts it, rejects it or reports that it cannot be read."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from draftsmith.stages.data.held_out import HeldOut
from draftsmith.stages.data.logs.filter import AcceptedAnswer, LogFilter
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import RejectLog, Row
from tests.stages.data.logs.logs_run import accepted, schema_filter
from tests.testbed.drafter import DrafterArtifacts

TEXT = st.text(st.characters(exclude_categories=()), max_size=12)
IDS = st.lists(st.one_of(st.integers(-1, 1200), st.integers(), st.booleans(), st.none()), max_size=6)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": TEXT}),
    max_size=3,
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=5,
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "messages": st.one_of(MESSAGES, JSON),
    "completion": st.one_of(TEXT, JSON),
    "prompt_token_ids": st.one_of(IDS, JSON),
    "completion_token_ids": st.one_of(IDS, JSON),
    "temperature": JSON,
    "top_p": JSON,
    "top_k": JSON,
    "repetition_penalty": JSON,
    "logit_bias": JSON,
    "response_format": JSON,
    "json_schema": JSON,
    "reasoning_content": JSON,
    "finish_reason": JSON,
    "timestamp": JSON,
    "started_at": JSON,
    "ended_at": JSON,
    "duration_s": JSON,
    "server": JSON,
    "id": JSON,
    "team": JSON,
}
ROWS = st.fixed_dictionaries({}, optional=FIELDS)


@pytest.fixture(scope="module")
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def log_filter(tiny_drafter: DrafterArtifacts, lines: io.StringIO) -> LogFilter:
    config = LogsConfig(paths=["a"], temperature=0, max_bad_share=1)
    return LogFilter(config, tiny_drafter.target, HeldOut(), RejectLog("logs.max_bad_share", 1, lines))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=ROWS)
def test_every_row_is_accepted_or_rejected_with_a_reason(
    fields: dict[str, Any], log_filter: LogFilter, lines: io.StringIO
) -> None:
    before = sum(log_filter.rejects.reasons.values())
    accepted = log_filter.accept(Row("log.jsonl", 1, fields))
    if isinstance(accepted, AcceptedAnswer):
        assert len(accepted.response_ids) >= 2 and accepted.prompt_ids.max() < 900
        assert sum(log_filter.rejects.reasons.values()) == before
    else:
        assert sum(log_filter.rejects.reasons.values()) == before + 1
        assert "\n" not in json.loads(lines.getvalue().splitlines()[-1])["reason"]


def test_deeply_nested_values_are_rejected_like_others() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    text = {"messages": [{"role": "user", "content": "3 + 4?"}], "completion": "7", "id": deep}
    times = {"started_at": 0, "duration_s": 1, "server": deep}
    bad: list[dict[str, Any]] = [
        text | {"temperature": deep},
        text | {"messages": [{"role": deep, "content": "3 + 4?"}]},
        text | {"messages": [{"role": "user", "content": [{"type": "text", "text": deep}]}]},
        {"prompt_token_ids": [1, deep], "completion_token_ids": [3, 4]},
    ]
    found = schema_filter(max_bad_share=1)
    assert accepted(found, [*bad, text | times]) == [*[None] * len(bad), True]
    assert dict(found.rejects.reasons) == {"cannot be read": len(bad)}


SAMPLED = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}


@pytest.mark.parametrize(
    ("configured", "logged", "reason"),
    [
        ({}, {"top_p": 0.9, "top_k": 20, "min_p": 0.1}, None),  # greedy decoding reads none of them
        ({}, {"repetition_penalty": 1.05}, "sampled with penalties"),
        ({}, {"logit_bias": {"5": -100, "6": None}}, "sampled with a logit bias"),
        ({}, {"logit_bias": {"5": 0, "6": None}, "response_format": {"type": "text"}}, None),
        ({}, {"response_format": {"type": "json_object"}}, "sampled under a response_format"),
        ({}, {"json_schema": '{"type": "object"}', "regex": None}, "sampled under a grammar"),
        (SAMPLED, {"logit_bias": "none", "response_format": "markdown"}, None),
        (SAMPLED, {"top_p": float(np.float32(0.9)), "top_k": 20, "min_p": 0.0}, None),
        (SAMPLED, {"top_p": 1.0}, "another top_p (1; logs.top_p is 0.9)"),
        (SAMPLED, {"top_k": -1}, "another top_k (0; logs.top_k is 20)"),
        (SAMPLED, {"min_p": 0.05}, "sampled with min_p"),
        (SAMPLED, {"presence_penalty": 0.5}, "sampled with penalties"),
        (SAMPLED, {"top_p": "0.9 of them", "top_k": {"documents": 3}}, None),  # somebody else's fields
        ({"temperature": 1}, {"top_k": -1}, None),
        ({"temperature": 1}, {"top_k": 50}, "another top_k (50; logs.top_k is 0)"),
    ],
)
def test_a_row_with_other_sampling_than_configured_is_rejected(
    configured: dict[str, Any], logged: dict[str, Any], reason: str | None
) -> None:
    found = schema_filter(**configured)
    row = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4], **logged}
    assert accepted(found, [row]) == [True if reason is None else None]
    assert dict(found.rejects.reasons) == ({} if reason is None else {reason: 1})


@pytest.mark.parametrize(("thought", "used"), [("First I add 3 and 4.", None), (" ", True), (None, True), (7, True)])
def test_text_without_its_reasoning_is_rejected_but_token_ids_are_not(thought: Any, used: bool | None) -> None:
    found = schema_filter()
    text = {"messages": [{"role": "user", "content": "3 + 4?"}], "completion": "7", "reasoning_content": thought}
    ids = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4]}
    assert accepted(found, [text, text | ids]) == [used, True]
    assert dict(found.rejects.reasons) == ({} if used else {"thinking that is not in the completion": 1})
