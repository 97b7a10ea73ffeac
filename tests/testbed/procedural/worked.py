"""Worked answers in five families: columns of additions, sorting, traces of a loop, tables with a running total,
spelling backwards; and sheets of four of them, whose answers are several hundred tokens long. Every answer follows from
its prompt, step by step.

A target that has learned them is nearly certain of every token, as a large model is of its reasoning, while a small
drafter, which proposes many tokens at once, has to work out the steps between them: the regime in which a drafter is
far from its target however long it is trained.
"""

from __future__ import annotations

import random

from tests.testbed.procedural.example import Example


def _words(text: str) -> list[str]:
    return text.split()


_SPELLED = _words(
    "lantern mountain harbour garden desert castle village forest window ladder pencil basket bridge candle feather "
    "hammer island jungle kettle mirror needle orange pepper rocket saddle ticket violin walnut yellow zipper"
)
_NAMES = _words("Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Karla Leo Mia Nora Oscar Paula")


def _addition(r: random.Random) -> Example:
    """Digits stand apart: a token each, whatever the tokenizer merges."""
    first, second = (r.randint(10**6, 10**9 - 1) for _ in range(2))
    columns = max(len(str(first)), len(str(second)))
    lines, carry = [], 0
    for column in range(columns):
        a, b = (value // 10**column % 10 for value in (first, second))
        total = a + b + carry
        lines.append(f"{a} + {b} + {carry} = {total}: write {total % 10}, carry {total // 10}")
        carry = total // 10
    lines.append(f"The sum is {_apart(first + second)}.")
    return Example("addition", f"Add {_apart(first)} and {_apart(second)} by columns.", "\n".join(lines))


def _sorting(r: random.Random) -> Example:
    left = r.sample(range(10, 100), r.randint(6, 9))
    prompt = f"Sort {_listed(left)} by selection."
    lines, placed = [], []
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        placed.append(least)
        lines.append(f"take {least}, left {_listed(left)}")
    lines.append(f"Sorted: {_listed(placed + left)}.")
    return Example("sorting", prompt, "\n".join(lines))


def _trace(r: random.Random) -> Example:
    a, b, step, rounds = r.randint(1, 40), r.randint(1, 12), r.randint(1, 6), r.randint(5, 8)
    prompt = f"Trace {rounds} rounds of a = a + b, b = b + {step} from a = {a}, b = {b}."
    lines = []
    for i in range(rounds):
        lines.append(f"round {i + 1}: a = {a} + {b} = {a + b}, b = {b} + {step} = {b + step}")
        a, b = a + b, b + step
    lines.append(f"At the end a is {a} and b is {b}.")
    return Example("trace", prompt, "\n".join(lines))


def _table(r: random.Random) -> Example:
    names = r.sample(_NAMES, r.randint(6, 9))
    counts = {name: r.randint(1, 30) for name in names}
    prompt = f"Make a table by name of {', '.join(f'{name} {count}' for name, count in counts.items())}."
    lines, total = ["| name | count | total |"], 0
    for name in sorted(names):
        total += counts[name]
        lines.append(f"| {name} | {counts[name]} | {total} |")
    lines.append(f"{len(names)} names, {total} in all.")
    return Example("table", prompt, "\n".join(lines))


def _spelling(r: random.Random) -> Example:
    words = r.sample(_SPELLED, r.randint(4, 5))
    lines = [f"{word}: {' '.join(word)}, backwards {' '.join(reversed(word))}" for word in words]
    lines.append(f"In the order of the alphabet: {', '.join(sorted(words))}.")
    return Example("spelling", f"Spell {', '.join(words)} backwards.", "\n".join(lines))


def _apart(number: int) -> str:
    return " ".join(str(number))


def _listed(numbers: list[int]) -> str:
    return " ".join(map(str, numbers))


WORKED = {
    "addition": _addition,
    "sorting": _sorting,
    "trace": _trace,
    "table": _table,
    "spelling": _spelling,
}
