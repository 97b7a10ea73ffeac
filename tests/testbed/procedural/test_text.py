"""Procedural text: the same from the same seed, prompts that differ, and a second wording of the same prompts."""

from __future__ import annotations

import pytest

from tests.testbed.procedural.text import EASY, FAMILIES, examples


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    first = list(examples(3, 50, families=list(FAMILIES)))
    assert first == list(examples(3, 50, families=list(FAMILIES)))
    assert first != list(examples(4, 50, families=list(FAMILIES)))


def test_families_take_turns_and_prompts_differ() -> None:
    made = list(examples(1, 500, families=list(FAMILIES)))
    assert [example.family for example in made[: len(FAMILIES)]] == list(FAMILIES)
    assert len({example.prompt for example in made}) == 500


def test_excluded_prompts_do_not_come_back() -> None:
    seen = frozenset(example.prompt for example in examples(1, 300))
    assert seen.isdisjoint(example.prompt for example in examples(1, 300, exclude=seen))


@pytest.mark.parametrize("family", EASY)
def test_revision_2_words_answers_differently_but_asks_the_same(family: str) -> None:
    old = list(examples(5, 40, families=[family]))
    new = list(examples(5, 40, families=[family], revision_2=1.0))
    first_words = {example.answer[:8] for example in old}
    assert first_words.isdisjoint(example.answer[:8] for example in new)
    assert {example.prompt.split()[0] for example in old} == {example.prompt.split()[0] for example in new}


def test_a_share_of_revision_2_is_kept() -> None:
    made = list(examples(6, 900, families=["story"], revision_2=0.7))
    share = sum(example.answer.startswith("Title:") for example in made) / len(made)
    assert share == pytest.approx(0.7, abs=0.06)  # four standard deviations of 900 draws


def test_an_exhausted_family_ends() -> None:
    made = list(examples(1, 10**6, families=["story"]))
    assert 6000 < len(made) <= 10 * 10 * 8 * 8  # animals, things, places, colours


def test_sums_in_problems_and_programs_are_right() -> None:
    for example in examples(8, 400, families=["problem", "program"]):
        lines = example.answer.splitlines()
        if example.family == "problem":
            for line in lines:
                if " = " in line:
                    left, right = line.rsplit(": ", 1)[1].rstrip(".").split(" = ")
                    assert eval(left) == int(right)
            assert lines[-1] == f"The answer is {_last_number(lines[-2])}."
        else:
            code = "\n".join(lines[1 : lines.index("```", 1)])
            printed: list[int] = []
            exec(code, {"print": printed.append, "range": range})
            assert [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("round")] == printed


def _last_number(line: str) -> int:
    return int(line.rstrip(".").rsplit(" ", 1)[1])
