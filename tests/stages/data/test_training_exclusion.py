"""On the same log, stage `logs` trains on no prompt that stage `prompts` holds out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.data.held_out import HELDOUT_SHARE, hash_fraction, prompt_identity
from draftsmith.stages.data.logs import stage as logs
from draftsmith.stages.data.row_formats import NOT_TEXT, TOOLS
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.info import load_tokenizer, model_path
from draftsmith.stages.target.resolve import resolve_target
from tests.stages.data import templates
from tests.stages.data.logs.logs_run import counts, table
from tests.stages.data.prompts_run import Row, error, run, run_with_context
from tests.stages.data.row_files import write
from tests.testbed.context import RecordingContext

WEATHER: list[Row] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL: Row = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather"}}],
}


@pytest.fixture(scope="module")
def with_template(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that returns the artifact of the tiny target with another chat template."""
    made: dict[str, Path] = {}

    def of(template: str) -> Path:
        if template not in made:
            folder = tmp_path_factory.mktemp("templated")
            shutil.copytree(tiny_target, folder / "model")
            (folder / "model" / "chat_template.jinja").write_text(template)
            (folder / "out").mkdir()
            resolve_target(TargetConfig(source=str(folder / "model"), dtype="float32"), folder / "out", lambda _: None)
            made[template] = folder / "out"
        return made[template]

    return of


def question(number: int) -> list[Row]:
    return [{"role": "user", "content": f"Question {number}?"}]


def kind(number: int) -> list[Row]:
    return [{"role": "system", "content": f"Be kind on day {number % 7}."}, *question(number)]


def called(number: int) -> list[Row]:
    returned = {"role": "tool", "content": f"sunny {number}"}
    return [*question(number), CALL, returned] if number % 2 else question(number)


def served(target: Path, conversations: list[list[Row]], **given: Any) -> list[Row]:
    """Return rows with the token ids of the prompts, as a server logs them, each with another answer."""
    tokenizer = load_tokenizer(model_path(target))
    rows = []
    for number, messages in enumerate(conversations):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **given)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        answer = tokenizer(f"Answer {number}.", add_special_tokens=False)["input_ids"]
        rows.append({"prompt": text, "prompt_token_ids": ids, "completion_token_ids": answer})
    return rows


def only(rows: list[Row], *names: str, **others: list[Any]) -> list[Row]:
    """Return the rows with these of their fields, and with other fields of one value a row."""
    return [
        {name: row[name] for name in names} | {name: values[index] for name, values in others.items()}
        for index, row in enumerate(rows)
    ]


def used(target: Path, folder: Path, log: Path, prompts: Path) -> RecordingContext:
    context = RecordingContext.under(folder / "logs", {"target": target, "prompts": prompts})
    config = {"paths": [str(log)], "temperature": 0, "scored": 0}
    logs.STAGE.run(context, logs.LogsConfig.model_validate(config))
    return context


IDS = ("prompt_token_ids", "completion_token_ids")


@pytest.mark.parametrize("case", ["system in the user's turn", "rendered prompt", "tools", "channel", "thoughts"])
def test_no_held_out_prompt_is_trained_on_in_any_row_format(
    case: str, with_template: Callable[[str], Path], tmp_path: Path
) -> None:
    """Rows of the held-out class, and no others, are left out of training."""
    numbers = range(400)
    cases: dict[str, tuple[str, Callable[[int], list[Row]], Row]] = {
        "system in the user's turn": (templates.GEMMA, kind, {}),
        "rendered prompt": (templates.TOOLS, question, {}),
        "tools": (templates.TOOLS, called, {"tools": WEATHER}),
        "channel": (templates.GPT_OSS, kind, {"today": "Monday"}),
        "thoughts": (templates.DEEPSEEK, kind, {"thinking": True}),
    }
    template, turns, given = cases[case]
    target, conversations = with_template(template), [turns(number) for number in numbers]
    rows = served(target, conversations, **given)
    if case == "rendered prompt":
        rows = only(rows, "prompt", *IDS)
    elif case == "tools":
        rows = only(rows, *IDS, messages=conversations, tools=[WEATHER] * len(rows))
    elif case == "system in the user's turn":
        rows = only(rows, *IDS, messages=conversations)
    else:
        rows = only(rows, *IDS)
    log = write(tmp_path / "log.jsonl", rows)

    held_out_rows = run(target, tmp_path, log, train=0, heldout=16, validation=4)
    trained = table(used(target, tmp_path, log, tmp_path / "out"))

    of = {tuple(row["prompt_token_ids"]): number for number, row in enumerate(rows)}
    asked_here = {of[tuple(row["token_ids"])] for row in held_out_rows}  # each as it was served
    trained_on = {of[tuple(row["prompt_ids"])] for row in trained}
    assert len(asked_here) == 20 and not asked_here & trained_on
    text = [[each | {"content": each["content"] or ""} for each in turns(number)] for number in numbers]
    held_out = {number for number in numbers if hash_fraction(prompt_identity(text[number])) < HELDOUT_SHARE}
    assert trained_on == set(numbers) - held_out, "of the class of its messages"


def test_both_stages_reject_rows_with_tools_or_images(target: Path, tmp_path: Path) -> None:
    """They do not count as bad rows, however many they are."""
    rows: list[Row] = [{"messages": question(number), "completion": f"Answer {number}."} for number in range(300)]
    for row in rows[:50]:
        row["messages"] += [CALL, {"role": "tool", "content": "sunny"}]
    for row in rows[50:60]:
        row["tools"] = WEATHER
    for row in rows[60:90]:
        row["messages"] = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]
    log = write(tmp_path / "log.jsonl", rows)
    held_out_rows, context = run_with_context(target, tmp_path, log, train=0, heldout=12, max_bad_share=0)
    numbers = {int(row["messages"][0]["content"].split()[1][:-1]) for row in held_out_rows}
    assert min(numbers) >= 90
    assert context.summaries["rows_set_aside"] == 90
    assert f"90 rows rejected: 60 {TOOLS}, 30 {NOT_TEXT}" in context.logs
    reasons = {TOOLS: 60, NOT_TEXT: 30}
    assert json.loads((context.out / "prompts.json").read_text())["set_aside"] == reasons
    counted = counts(used(target, tmp_path, log, context.out))["set_aside"]
    assert {reason: counted[reason] for reason in reasons} == reasons
    assert len((context.out / "set_aside.jsonl").read_text().splitlines()) == 90

    few = error(target, tmp_path / "few", write(tmp_path / "few.jsonl", rows[:100]), train=0, heldout=50)
    assert f"rejected: 60 {TOOLS}, 30 {NOT_TEXT})" in few
    none = error(target, tmp_path / "none", write(tmp_path / "none.jsonl", rows[:20]))
    assert f"none of 20 rows can be a prompt (20 {TOOLS})" in none
