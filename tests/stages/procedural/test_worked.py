"""Worked answers: every step follows from the prompt, and the result is right."""

from __future__ import annotations

import re

from draftsmith.stages.procedural.example import Example
from draftsmith.stages.procedural.text import examples


def _of(family: str) -> list[Example]:
    return list(examples(3, 40, families=[family]))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_columns_add_up() -> None:
    for example in _of("addition"):
        *columns, result = example.answer.splitlines()
        first, second = (int(part.replace(" ", "")) for part in re.findall(r"\d(?: \d)+", example.prompt))
        carried, written = 0, ""
        for line in columns:
            a, b, carry, total, digit, carries = _numbers(line)
            assert carry == carried and total == a + b + carry == 10 * carries + digit
            carried, written = carries, str(digit) + written
        assert int(result.removeprefix("The sum is ").rstrip(".").replace(" ", "")) == first + second
        assert int(str(carried) + written) == first + second


def test_every_pass_takes_the_least_number() -> None:
    for example in _of("sorting"):
        *passes, result = example.answer.splitlines()
        left = _numbers(example.prompt)
        assert _numbers(result) == sorted(left)
        for line in passes:
            least, *rest = _numbers(line)
            assert least == min(left)
            left.remove(least)
            assert rest == left
        assert len(left) == 1


def test_a_loop_does_what_its_trace_says() -> None:
    for example in _of("trace"):
        rounds, step, a, b = _numbers(example.prompt)
        *lines, result = example.answer.splitlines()
        for number, line in enumerate(lines, start=1):
            assert _numbers(line) == [number, a, b, a + b, b, step, b + step]
            a, b = a + b, b + step
        assert (len(lines), _numbers(result)) == (rounds, [a, b])


def test_a_table_is_in_order_with_its_running_total() -> None:
    for example in _of("table"):
        _, *rows, result = example.answer.splitlines()
        asked = dict(re.findall(r"(\w+) (\d+)", example.prompt))
        names = [row.split()[1] for row in rows]
        assert names == sorted(asked)
        total = 0
        for name, row in zip(names, rows, strict=True):
            total += int(asked[name])
            assert _numbers(row) == [int(asked[name]), total]
        assert _numbers(result) == [len(names), total]


def test_words_are_spelled_backwards() -> None:
    for example in _of("spelling"):
        *lines, result = example.answer.splitlines()
        words = example.prompt.removeprefix("Spell ").removesuffix(" backwards.").split(", ")
        assert lines == [f"{word}: {' '.join(word)}, backwards {' '.join(word[::-1])}" for word in words]
        assert result.removesuffix(".").split(": ")[1].split(", ") == sorted(words)


def test_a_sheet_answers_its_exercises_in_turn() -> None:
    alone = {example.prompt: example for family in ("sorting", "trace", "spelling") for example in _of(family)}
    for example in _of("sheet"):
        asked = re.split(r"^\d\) ", example.prompt, flags=re.MULTILINE)[1:]
        answers = re.split(r"^\d\) ", example.answer, flags=re.MULTILINE)[1:]
        families = [answer.splitlines()[0] for answer in answers]
        assert len(asked) == len(answers) == len(set(families)) == 4
        for prompt, family, answer in zip(asked, families, answers, strict=True):
            assert {"addition": "Add", "sorting": "Sort", "trace": "Trace", "table": "Make", "spelling": "Spell"}[
                family
            ] == prompt.split()[0]
            if family == "sorting":
                assert _numbers(answer.splitlines()[-1] if answer.strip() else "") == sorted(_numbers(prompt))
    assert alone
