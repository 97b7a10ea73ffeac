"""The held-out class of a prompt depends on its text alone; token ids have the class of their text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.stages.data.chat_template import TemplateInverter, token_ids
from draftsmith.stages.data.held_out import HeldOut, hash_fraction, prompt_identity, read_held_out
from draftsmith.stages.data.row_formats import Message, TemplateKwargs
from draftsmith.stages.target.info import load_tokenizer, model_path
from tests.stages.data.templates import DEEPSEEK, GPT_OSS, LLAMA
from tests.testbed.drafter import DrafterArtifacts


def chat(*turns: str, system: str | None = None) -> list[Message]:
    """Return alternating turns of a user and an assistant."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return messages + [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]


def test_the_hash_of_a_prompt_never_changes() -> None:
    """Another hash would train on prompts that were held out before."""
    assert prompt_identity(chat("Hello")).hex() == "33f2611766804411d594174b3956ef40"
    assert hash_fraction(prompt_identity(chat("Hello"))) == pytest.approx(0x33F2 / 0x10000, abs=1e-4)


@given(st.text(alphabet="ab \n\t", min_size=1), st.sampled_from([" ", "\n", "\t  "]), st.text())
def test_system_prompt_and_white_space_do_not_change_the_identity(text: str, blank: str, system: str) -> None:
    plain = prompt_identity(chat(text))
    assert prompt_identity(chat(f"{blank}{text.replace(' ', blank)}{blank}", system=system)) == plain


def test_case_turns_and_roles_change_the_identity() -> None:
    texts = [chat("hello"), chat("Hello"), chat("hello", "yes", "hello"), chat("hello hello")]
    assert len({prompt_identity(messages) for messages in texts}) == 4


def test_by_conversation_all_turns_share_an_identity() -> None:
    """It is that of the first user message, also after a greeting of the assistant."""
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
    from draftsmith.artifacts.tables.parquet import read_table
    from draftsmith.artifacts.tables.schemas import PROMPTS

    for row in read_table(tiny_drafter.prompts / "prompts.parquet", PROMPTS).to_pylist():
        held_out = row["split"] != "train"
        assert outside.is_held_out(row["messages"], [0]) is held_out
        assert outside.is_held_out(chat("another text"), row["token_ids"]) is held_out


@pytest.mark.parametrize("template", [None, LLAMA, GPT_OSS, DEEPSEEK])
@pytest.mark.parametrize(
    "messages",
    [
        chat("What is  7 times 8?"),
        chat("Hello", "Yes?", "Tell a story."),
        chat("A", "b", "C", "d", "E", system="Be kind."),
        chat("Hello", system="Be kind."),
    ],
)
@pytest.mark.parametrize("quiet", [False, True])
def test_decoded_token_ids_have_the_identity_of_their_text(
    template: str | None, messages: list[Message], quiet: bool, tiny_drafter: DrafterArtifacts
) -> None:
    tokenizer = load_tokenizer(model_path(tiny_drafter.target))
    if template is not None:
        tokenizer.chat_template = template
    sent: TemplateKwargs = {"today": "Monday", "quiet": quiet, "thinking": quiet}
    ids = token_ids(tokenizer, messages, "row 1", sent)
    read = TemplateInverter(tokenizer, {"today": "Friday"}).messages(ids)
    assert prompt_identity(read) == prompt_identity(messages)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "{% for m in messages %}{{ m.content }}{% endfor %}", ""]
)
def test_a_template_that_cannot_be_inverted_gives_the_whole_text(template: str, tiny_drafter: DrafterArtifacts) -> None:
    tokenizer = load_tokenizer(model_path(tiny_drafter.target))
    tokenizer.chat_template = template
    ids = tokenizer("Tell a story", add_special_tokens=False)["input_ids"]
    assert TemplateInverter(tokenizer, {}).messages(ids) == chat("Tell a story")
