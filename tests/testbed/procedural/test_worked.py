"""Worked answers: every step follows from the prompt, and the result is right."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.testbed.procedural.text import examples


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _columns_add_up(prompt: str, answer: str) -> None:
    *columns, result = answer.splitlines()
    first, second = (int(part.replace(" ", "")) for part in re.findall(r"\d(?: \d)+", prompt))
    carried, written = 0, ""
    for line in columns:
        a, b, carry, total, digit, carries = _numbers(line)
        assert carry == carried and total == a + b + carry == 10 * carries + digit
        carried, written = carries, str(digit) + written
    assert int(result.removeprefix("The sum is ").rstrip(".").replace(" ", "")) == first + second
    assert int(str(carried) + written) == first + second


def _every_pass_takes_the_least_number(prompt: str, answer: str) -> None:
    *passes, result = answer.splitlines()
    left = _numbers(prompt)
    assert _numbers(result) == sorted(left)
    for line in passes:
        least, *rest = _numbers(line)
        assert least == min(left)
        left.remove(least)
        assert rest == left
    assert len(left) == 1


def _the_loop_does_what_its_trace_says(prompt: str, answer: str) -> None:
    rounds, step, a, b = _numbers(prompt)
    *lines, result = answer.splitlines()
    for number, line in enumerate(lines, start=1):
        assert _numbers(line) == [number, a, b, a + b, b, step, b + step]
        a, b = a + b, b + step
    assert (len(lines), _numbers(result)) == (rounds, [a, b])


def _the_table_is_in_order_with_its_running_total(prompt: str, answer: str) -> None:
    _, *rows, result = answer.splitlines()
    asked = dict(re.findall(r"(\w+) (\d+)", prompt))
    names = [row.split()[1] for row in rows]
    assert names == sorted(asked)
    total = 0
    for name, row in zip(names, rows, strict=True):
        total += int(asked[name])
        assert _numbers(row) == [int(asked[name]), total]
    assert _numbers(result) == [len(names), total]


def _words_are_spelled_backwards(prompt: str, answer: str) -> None:
    *lines, result = answer.splitlines()
    words = prompt.removeprefix("Spell ").removesuffix(" backwards.").split(", ")
    assert lines == [f"{word}: {' '.join(word)}, backwards {' '.join(word[::-1])}" for word in words]
    assert result.removesuffix(".").split(": ")[1].split(", ") == sorted(words)


CHECKS: dict[str, Callable[[str, str], None]] = {
    "addition": _columns_add_up,
    "sorting": _every_pass_takes_the_least_number,
    "trace": _the_loop_does_what_its_trace_says,
    "table": _the_table_is_in_order_with_its_running_total,
    "spelling": _words_are_spelled_backwards,
}


@pytest.mark.parametrize("family", CHECKS)
def test_every_step_follows_from_the_prompt(family: str) -> None:
    for example in examples(3, 40, families=[family]):
        CHECKS[family](example.prompt, example.answer)
