"""Whatever the fields of some rows hold, stages `logs` and `prompts` reject these rows and use the others."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from draftsmith.artifacts.redaction import MAX_SHOWN, printable
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS, TRAJECTORIES
from draftsmith.stages.data.logs.stage import STAGE as LOGS
from draftsmith.stages.data.prompts.stage import STAGE as ALL_PROMPTS
from draftsmith.stages.runtime.process import EventStream, ProcessContext
from draftsmith.stages.runtime.stage import Stage, StageRequest
from tests.stages.data.logs.logs_run import as_ids
from tests.stages.data.prompts_run import of_classes
from tests.testbed.drafter import DrafterArtifacts

# Values as the text of their JSON.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=12),  # surrogates, controls and direction marks too
    st.sampled_from(["\ud83d", "\x1b]0;title\x07", "over\rwritten", "\u202eevil", "\x00", "a-" * 10_000, " " * 20_000]),
)
SCALAR = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT)
JSON = st.recursive(
    SCALAR, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)), max_leaves=5
)
ROLE = st.one_of(st.sampled_from(["user", "assistant", "system", "tool"]), JSON)
MESSAGES = st.lists(st.fixed_dictionaries({"role": ROLE, "content": st.one_of(TEXT, JSON)}), max_size=3)
VALUE = st.one_of(
    JSON.map(json.dumps),
    MESSAGES.map(json.dumps),
    MESSAGES.map(json.dumps).map(json.dumps),  # messages as JSON text
    st.lists(st.one_of(TEXT, JSON), max_size=3).map(json.dumps),  # turns
    st.lists(SCALAR, max_size=6).map(json.dumps),  # token ids
    st.sampled_from(["NaN", "Infinity", "-1e999", "9" * 400, "9" * 5000, '{"type": "text", "text": [[]]}']),
    st.integers(1, 1200).map(lambda depth: "[" * depth + "]" * depth),
    st.integers(1, 1200).map(lambda depth: '[{"role":' * depth + "1" + "}]" * depth),
)
NAMES = ["messages", "completion", "prompt_token_ids", "completion_token_ids", "prompt", "conversations", "turns"]
NAMES += [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "logit_bias",
    "response_format",
    "json_schema",
]
NAMES += ["reasoning_content", "finish_reason", "stop", "matched_stop", "tools", "functions", "timestamp", "created"]
NAMES += ["started_at", "ended_at", "duration_s", "server", "id", "model", "language", "team"]
HOSTILE = st.dictionaries(st.one_of(st.sampled_from(NAMES), TEXT), VALUE, min_size=1, max_size=4)
ROWS = st.lists(st.tuples(HOSTILE, st.booleans()), min_size=1, max_size=4)  # fields; whether a good row has them

Row = dict[str, Any]


def log_of(good: Sequence[Row], hostile: Sequence[tuple[Mapping[str, str], bool]]) -> str:
    """Return the lines of a log, the hostile rows first."""
    lines = []
    for number, (fields, added) in enumerate(hostile):
        texts = {name: json.dumps(value) for name, value in good[number].items()} if added else {}
        lines.append(
            "{" + ", ".join(f"{json.dumps(name)}: {text}" for name, text in (texts | dict(fields)).items()) + "}"
        )
    return "".join(f"{line}\n" for line in [*lines, *map(json.dumps, good)])


@pytest.fixture
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that runs a stage on a log as its process does, and returns its artifact."""

    def run(stage: Stage, target: Path, lines: str, **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("hostile")
        (folder / "log.jsonl").write_text(lines)
        request = StageRequest(
            stage=stage.name,
            module="",
            config={},
            inputs={"target": target},
            out=folder / "out",
            work=folder / "work",
            seed=0,
        )
        paths: Row = {"paths": [str(folder / "log.jsonl")]}
        if stage is ALL_PROMPTS:
            paths = {"sources": [{"kind": "jsonl", "path": str(folder / "log.jsonl")}]}
        stream = os.open(folder / "events", os.O_WRONLY | os.O_CREAT)
        try:
            context = ProcessContext(request, EventStream(stream), threading.Event())
            stage.run(context, stage.config.model_validate({"max_bad_share": 1, **paths, **config}))
        finally:
            os.close(stream)
        events = (folder / "events").read_bytes().decode("ascii").splitlines()
        assert all(len(json.loads(event).get("message", "")) <= MAX_SHOWN for event in events)
        return folder / "out"

    return run


def rejected(out: Path) -> list[int]:
    """Return the numbers of the rejected rows, each of which has a reason."""
    listed = [json.loads(line) for line in (out / "set_aside.jsonl").read_text("ascii").splitlines()]
    for entry in listed:
        reason = entry["reason"]
        assert printable(reason) == reason and "\n" not in reason and 0 < len(reason) < MAX_SHOWN + 50
    return [entry["row"] for entry in listed]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=ROWS)
@example(hostile=[({"model": r'"half a pair \ud83d"'}, True), ({"model": r'"\u001b[2J"'}, True)])  # named in a warning
def test_logs_keeps_the_good_rows(
    hostile: list[tuple[dict[str, str], bool]],
    run: Callable[..., Path],
    tiny_drafter: DrafterArtifacts,
    logged_answers: list[Row],
) -> None:
    good = [as_ids(row) | {"timestamp": "2026-03-05"} for row in logged_answers[:6]]
    out = run(LOGS, tiny_drafter.target, log_of(good, hostile), temperature=0, since="2026-03-01", scored=0)
    used = read_table(out / "trajectories.parquet", TRAJECTORIES).to_pylist()
    assert {tuple(row["completion_token_ids"]) for row in good} <= {tuple(row["response_ids"]) for row in used}
    summary = json.loads((out / "logs.json").read_text())
    assert summary["used"] + len(rejected(out)) + summary["outside_window"] == len(hostile) + len(good)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(hostile=ROWS)
@example(hostile=[({"language": r'"half a pair \ud83d"'}, True)])
def test_prompts_keeps_the_good_rows(
    hostile: list[tuple[dict[str, str], bool]], run: Callable[..., Path], target: Path
) -> None:
    good = [row | {"language": "de"} for row in of_classes("Question", 6, 2)]
    config = {"train": 6, "heldout": 2, "slices": ["language"], "too_long": "skip"}
    out = run(ALL_PROMPTS, target, log_of(good, hostile), **config)
    assert len(read_table(out / "prompts.parquet", PROMPTS)) == 8
    assert max(rejected(out), default=0) <= len(hostile)
