"""The command of `configs/own-logs.md` that converts SGLang's own log and vLLM's responses to rows."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.stages.data.logs.logs_run import accepted, schema_filter

README = Path(__file__).parents[4] / "configs" / "own-logs.md"
# Of SGLang 0.5.20 for a chat, shortened: without fields that nothing reads.
PARAMS = {"temperature": 0.0, "max_new_tokens": 3, "stop": None, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
PARAMS |= {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None}
OUT = {"text": " How are", "output_ids": [94, 352, 758], "meta_info": {"completion_tokens": 3, "e2e_latency": 2.5}}


def line(event: str, **fields: Any) -> str:
    record = {"timestamp": "2026-11-29T11:43:28.869656", "event": event, **fields}
    return f"[2026-11-29 11:43:28] {json.dumps(record)}\n"


def request(ids: list[int] | None, **params: Any) -> dict[str, Any]:
    return {"rid": "7434ec", "text": "What is", "input_ids": ids, "sampling_params": PARAMS | params, "stream": False}


def converted(folder: Path) -> list[dict[str, Any]]:
    """Run the documented command in this folder and return its rows."""
    command = next(block for block in README.read_text("utf-8").split("```") if block.strip().startswith("cat FOLDER"))
    subprocess.run(command, shell=True, check=True, cwd=folder)
    return [json.loads(row) for row in (folder / "answers.jsonl").read_text().splitlines()]


def response(*choices: dict[str, Any], **fields: Any) -> str:
    return json.dumps({"id": "cmpl-1", "created": 1796000000, "model": "m", "choices": choices, **fields}) + "\n"


NEEDS_JQ = pytest.mark.skipif(shutil.which("jq") is None, reason="no jq here")


@NEEDS_JQ
def test_it_makes_rows_of_vllms_responses_with_one_whole_answer(tmp_path: Path) -> None:
    """Of 0.32.0, shortened. Left out: several answers, one that was cut, and the chunks of a stream."""
    (tmp_path / "FOLDER").mkdir()
    answer = {"finish_reason": "stop", "token_ids": [94, 352]}
    chat = {"prompt_token_ids": [1, 316]}
    written = [
        response({**answer, "prompt_token_ids": [1, 315]}),
        response({**answer, "finish_reason": "length"}, **chat),
        response(answer, answer, **chat),
        response({**answer, "finish_reason": "abort"}, **chat),
        response({"delta": {"content": "x"}, "finish_reason": None, "token_ids": [94]}, **chat),
        response({"delta": {}, "finish_reason": "stop", "token_ids": [352]}),
        response(),
    ]
    (tmp_path / "FOLDER" / "responses.log").write_text("".join(written))
    rows = converted(tmp_path)
    assert [(row["prompt_token_ids"], row["completion_token_ids"]) for row in rows] == [
        ([1, 315], [94, 352]),
        ([1, 316], [94, 352]),
    ]
    assert accepted(schema_filter(since="2026-11-29"), rows) == [True, True]


@NEEDS_JQ
def test_the_documented_command_makes_rows_with_token_ids_and_sampling(tmp_path: Path) -> None:
    (tmp_path / "FOLDER").mkdir()
    ended = [
        request([1, 315, 202]) | {"lora_path": "support"},
        request([1, 315, 203], json_schema='{"type": "object"}'),
        request(None),
    ]
    written = [
        line("request.received.openai", obj={"messages": [{"role": "user", "content": "What is"}]}),
        line("request.received", rid="7434ec", obj=request([1, 315, 202])),
        *(line("request.finished", rid="7434ec", obj=each, out=OUT) for each in ended),
    ]
    (tmp_path / "FOLDER" / "host_0.log.2026-11-29_10").write_text("".join(written))
    (tmp_path / "FOLDER" / "host_0.log").write_text(written[-1][:100])  # it is being written
    rows = converted(tmp_path)
    assert [(row["prompt_token_ids"], row["completion_token_ids"]) for row in rows] == [
        ([1, 315, 202], [94, 352, 758]),
        ([1, 315, 203], [94, 352, 758]),
    ]
    assert [row["model"] for row in rows] == ["support", "base"]
    for name, chosen in (("support", [True, None]), ("base", [None, None])):
        assert accepted(schema_filter(since="2026-11-29", filter={"model": name}), rows) == chosen
    assert [(row["ended_at"], row["duration_s"]) for row in rows] == [("2026-11-29T11:43:28.869656", 2.5)] * 2
    found = schema_filter(since="2026-11-29")
    assert accepted(found, rows) == [True, None]
    assert dict(found.rejects.reasons) == {"sampled under a grammar": 1}
    assert found.in_flight.shares() == {2: 1.0}
    assert found.newest is not None and found.newest.isoformat() == "2026-11-29T11:43:28.869656+00:00"
