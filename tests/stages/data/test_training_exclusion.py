"""Stage `logs` trains on no prompt that stage `prompts` holds out, of the same log or in another week.

The held-out class of a prompt depends only on its text; token ids have the class of their text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.data.chat_template import TemplateInverter
from draftsmith.stages.data.held_out import HELDOUT_SHARE, HeldOut, hash_fraction, prompt_identity, read_held_out
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.data.row_formats import NOT_TEXT, TOOLS, Message
from draftsmith.stages.targets.info import load_tokenizer, model_path
from tests.stages.data import templates
from tests.stages.data.logs.logs_run import counts, table
from tests.stages.data.logs.logs_run import run as run_logs
from tests.stages.data.prompts_run import Row, error, run, run_with_context
from tests.stages.data.row_files import write
from tests.testbed.drafter import DrafterArtifacts

WEATHER: list[Row] = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CALL: Row = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "weather"}}],
}


def question(number: int) -> list[Row]:
    return [{"role": "user", "content": f"Question {number}?"}]


def kind(number: int) -> list[Row]:
    asked = question(number)
    if number % 3 == 0:
        asked += [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": f"Tell  a story of {number}."}]
    return [{"role": "system", "content": f"Be kind on day {number % 7}."}, *asked][number % 2 :]


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
        asked = {"prompt": text, "messages": messages, "tools": given.get("tools")}
        rows.append(asked | {"prompt_token_ids": ids, "completion_token_ids": answer})
    return rows


IDS = ("prompt_token_ids", "completion_token_ids")


# of each: the template, the messages of a number, the template's arguments, and fields in addition to the token ids
CASES: dict[str, tuple[str, Callable[[int], list[Row]], Row, list[str]]] = {
    "system in the user's turn": (templates.GEMMA, kind, {}, ["messages"]),
    "rendered prompt": (templates.TOOLS, question, {}, ["prompt"]),
    "tools": (templates.TOOLS, called, {"tools": WEATHER}, ["messages", "tools"]),
    "channel": (templates.GPT_OSS, kind, {"today": "Monday"}, []),
    "thoughts": (templates.DEEPSEEK, kind, {"thinking": True}, []),
    "closed thoughts": (templates.DEEPSEEK, kind, {"thinking": False}, []),
    "date": (templates.LLAMA, kind, {"today": "Monday"}, []),
    "date, quiet": (templates.LLAMA, kind, {"today": "Monday", "quiet": True}, []),
}


@pytest.mark.parametrize("case", CASES)
def test_no_held_out_prompt_is_trained_on_in_any_row_format(
    case: str, with_template: Callable[[str], Path], tmp_path: Path
) -> None:
    """Training excludes the rows of the held-out class, and no others."""
    numbers = range(400)
    template, turns, given, beside = CASES[case]
    target = with_template(template)
    served_rows = served(target, [turns(number) for number in numbers], **given)
    rows = [{name: row[name] for name in (*IDS, *beside)} for row in served_rows]
    log = write(tmp_path / "log.jsonl", rows)

    held_out_rows = run(target, tmp_path, log, train=0, heldout=16, validation=4)
    trained = table(run_logs(tmp_path, target, log, inputs={"prompts": tmp_path / "out"}, scored=0))

    of = {tuple(row["prompt_token_ids"]): number for number, row in enumerate(rows)}
    asked_here = {of[tuple(row["token_ids"])] for row in held_out_rows}  # each as it was served
    trained_on = {of[tuple(row["prompt_ids"])] for row in trained}
    assert len(asked_here) == 20 and not asked_here & trained_on
    text = [[each | {"content": each["content"] or ""} for each in row["messages"]] for row in served_rows]
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
    counted = counts(run_logs(tmp_path, target, log, inputs={"prompts": context.out}, scored=0))["set_aside"]
    assert {reason: counted[reason] for reason in reasons} == reasons
    assert len((context.out / "set_aside.jsonl").read_text().splitlines()) == 90

    few = error(target, tmp_path / "few", write(tmp_path / "few.jsonl", rows[:100]), train=0, heldout=50)
    assert f"rejected: 60 {TOOLS}, 30 {NOT_TEXT})" in few
    none = error(target, tmp_path / "none", write(tmp_path / "none.jsonl", rows[:20]))
    assert f"none of 20 rows can be a prompt (20 {TOOLS})" in none


ANSWER = "the cat is here ."


def conversation(text: str, *before: str) -> Row:
    """Return a row of a conversation: its turns so far, each answered, and one more."""
    turns = [
        {"role": role, "content": turn} for text in before for role, turn in (("user", text), ("assistant", ANSWER))
    ]
    return {"messages": [*turns, {"role": "user", "content": text}], "completion": ANSWER}


def a_week(
    folder: Path, made: DrafterArtifacts, rows: list[Row], **prompts: Any
) -> tuple[list[Row], set[tuple[int, ...]]]:
    """Return the held-out prompts of a week, and the token ids of its training prompts."""
    folder.mkdir()
    log = write(folder / "log.jsonl", rows)
    source = {"kind": "jsonl", "path": str(log), **prompts.pop("source", {})}
    settings = {"train": 0, "validation": 2, "heldout": 14, "max_prompt_tokens": 200, **prompts}
    held_out = run(made.target, folder / "prompts", [source], **settings)
    ctx = run_logs(folder, made.target, log, inputs={"prompts": folder / "prompts" / "out"}, scored=0)
    assert counts(ctx)["set_aside"].keys() <= {"prompt of the validation or held-out split"}
    return held_out, {tuple(row["prompt_ids"]) for row in table(ctx)}


def test_the_heldout_share_of_a_source_applies_to_logs_too(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    rows = [conversation(f"tell story {number} of the cat") for number in range(300)]
    own: Row = {"source": {"heldout_share": 0.3}}
    _, trained = a_week(tmp_path / "1", tiny_drafter, rows, **own)
    assert json.loads((tmp_path / "1" / "run" / "out" / "logs.json").read_text())["heldout_share"] == 0.3
    held_out, _ = a_week(
        tmp_path / "2", tiny_drafter, rows[100:180], **own
    )  # fewer, so that other prompts are held out
    assert trained and not {tuple(row["token_ids"]) for row in held_out} & trained


def test_a_benchmark_does_not_raise_the_heldout_share_of_logs() -> None:
    def share(section: float, *own: float | None) -> float:
        sources = [{"kind": "jsonl", "path": str(number), "heldout_share": each} for number, each in enumerate(own)]
        settings = {"sources": sources, "train": 0, "heldout": 1, "heldout_share": section}
        return PromptsConfig.model_validate(settings).max_heldout_share

    assert share(0.1, None) == share(0.1, 1) == share(0.1, 0.05, 1) == 0.1
    assert share(0.1, None, 0.3, 0.2, 1) == 0.3 and share(1, None) == 1


@pytest.mark.parametrize(("by", "suffix"), [("prompt", ""), ("conversation", ""), ("conversation", " in the end")])
def test_by_conversation_all_turns_of_a_held_out_one_are_excluded(
    by: str, suffix: str, tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    rows: list[Row] = []
    for number in range(150):
        turns = [f"tell story {number} of the cat", "tell more", "tell the end"]
        rows += [conversation(turn, *turns[:index]) for index, turn in enumerate(turns)]
    held_out, _ = a_week(tmp_path / "1", tiny_drafter, rows, heldout_by=by, source={"suffix": suffix})
    assert all(row["messages"][-1]["content"].endswith(suffix) for row in held_out)
    kept = json.loads((tmp_path / "1" / "prompts" / "out" / "prompts.json").read_text())
    assert kept["heldout_by"] == by
    openings = {row["messages"][0]["content"].removesuffix(suffix) for row in held_out}
    log = write(tmp_path / "of-these.jsonl", [row for row in rows if row["messages"][0]["content"] in openings])
    inputs = {"prompts": tmp_path / "1" / "prompts" / "out"}
    again = partial(run_logs, tmp_path / "2", tiny_drafter.target, log, inputs=inputs, scored=0)
    if by == "conversation":
        with pytest.raises(Exception, match=rf"none of {3 * len(openings)} rows of \S+ can be used"):
            again()
    else:
        assert table(again()), "another turn of theirs is trained on"


def chat(*turns: str, system: str | None = None) -> list[Message]:
    """Return alternating turns of a user and an assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def test_the_hash_of_a_prompt_never_changes() -> None:
    """Another hash would train on prompts that were held out before."""
    assert prompt_identity(chat("Hello")).hex() == "33f2611766804411d594174b3956ef40"
    assert hash_fraction(prompt_identity(chat("Hello"))) == pytest.approx(0x33F2 / 0x10000, abs=1e-4)
    turns = chat("Hello", "Yes?", "Grüße,  Anna.", system="Be kind.")
    assert prompt_identity(turns).hex() == "021cd33fba1b3693ab7a141d940ffb6e"


@given(st.text(alphabet="ab \n\t", min_size=1), st.sampled_from([" ", "\n", "\t  "]), st.text())
def test_system_prompt_and_white_space_do_not_change_the_identity(text: str, blank: str, system: str) -> None:
    plain = prompt_identity(chat(text))
    assert prompt_identity(chat(f"{blank}{text.replace(' ', blank)}{blank}", system=system)) == plain


def test_case_turns_and_roles_change_the_identity() -> None:
    texts = [chat("hello"), chat("Hello"), chat("hello", "yes", "hello"), chat("hello hello")]
    assert len({prompt_identity(messages) for messages in texts}) == 4


def test_by_conversation_all_turns_share_an_identity() -> None:
    """The first user message decides, even after a greeting of the assistant."""
    turns = [chat("hello", system="Be kind."), chat("hello", "yes?", "what?"), chat(" hello", "no.", "why?")]
    assert {prompt_identity(messages, "conversation") for messages in turns} == {prompt_identity(chat("hello"))}
    assert len({prompt_identity(messages) for messages in turns}) == 3
    greeted: list[Message] = [{"role": "assistant", "content": "How can I help?"}, *chat("hello")]
    assert prompt_identity(greeted, "conversation") == prompt_identity(chat("hello")) != prompt_identity(greeted)


@given(st.text(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_contains_the_smaller(text: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert not HeldOut(small).is_held_out(chat(text), [1]) or HeldOut(large).is_held_out(chat(text), [1])


def test_a_tenth_of_all_prompts_is_held_out() -> None:
    count = sum(HeldOut().is_held_out(chat(f"Question {number}"), [number]) for number in range(4000))
    assert 330 < count < 470


def test_the_prompts_of_held_out_splits_are_held_out_in_any_class(tiny_drafter: DrafterArtifacts) -> None:
    held_out = read_held_out(tiny_drafter.prompts)
    assert held_out.share == 0.25 and read_held_out(None) == HeldOut(0.1)
    outside = HeldOut(1e-9, held_out.identities, held_out.token_digests)
    for row in read_table(tiny_drafter.prompts / "prompts.parquet", PROMPTS).to_pylist():
        held_out = row["split"] != "train"
        assert outside.is_held_out(row["messages"], [0]) is held_out
        assert outside.is_held_out(chat("another text"), row["token_ids"]) is held_out


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "{% for m in messages %}{{ m.content }}{% endfor %}", ""]
)
def test_a_template_that_cannot_be_inverted_gives_the_whole_text(template: str, tiny_drafter: DrafterArtifacts) -> None:
    tokenizer = load_tokenizer(model_path(tiny_drafter.target))
    tokenizer.chat_template = template
    ids = tokenizer("Tell a story", add_special_tokens=False)["input_ids"]
    assert TemplateInverter(tokenizer, {}).messages(ids) == chat("Tell a story")
