"""Procedural text (JSON records, dialogues, stories, programs, word problems): prompts with answers.

Answers draw their slots from small lists and repeat them (a record's city is the prompt's, a story's hero comes back in
every sentence), so that a model of a few million parameters or less learns well-formed text with parts that are
certain and parts that are not: what a drafter needs to be tested on. The first three families have a second wording
("revision 2") of the same answers: a target that is trained further on it is a new revision of the first one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

from tests.testbed.procedural.example import Example
from tests.testbed.procedural.worked import WORKED


def _words(text: str) -> list[str]:
    return text.split()


NAMES = _words(
    "Anna Ben Clara David Emma Felix Grace Henry Iris Jonas Karla Leo Mia Nora Oscar Paula Quentin Rosa Simon Tina"
)
CITIES = _words("Berlin Cairo Dublin Lima Madrid Oslo Paris Rome Tokyo Vienna")
COLOURS = _words("red blue green yellow black white silver golden")
ANIMALS = _words("fox bear owl rabbit wolf mouse horse goat duck cat")
PLACES = _words("forest valley village harbour garden desert mountain castle")
THINGS = _words("lantern map key bell book ring coat kite boat drum")
FEELINGS = _words("happy proud calm brave tired curious")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
FOODS = _words("soup bread rice fish cake salad pasta tea")
JOBS = _words("baker doctor farmer painter pilot teacher")
VARIABLES = _words("a b n x total left count price speed width")
PLANS = [
    "visit the museum",
    "walk in the park",
    "cook some dinner",
    "watch the boats",
    "play a game",
    "repair my bicycle",
    "paint a picture",
]


def _record(r: random.Random) -> Example:
    name, city, job, colour, food = (r.choice(x) for x in (NAMES, CITIES, JOBS, COLOURS, FOODS))
    fields = [
        f'"name": "{name}"',
        f'"job": "{job}"',
        f'"city": "{city}"',
        f'"likes": ["{colour} {r.choice(THINGS)}", "{food}"]',
    ]
    extra = [
        f'"open": {r.choice(["true", "false"])}',
        f'"days": ["{r.choice(DAYS)}", "{r.choice(DAYS)}"]',
        f'"pet": {{"kind": "{r.choice(ANIMALS)}", "colour": "{r.choice(COLOURS)}"}}',
        f'"mood": "{r.choice(FEELINGS)}"',
        f'"home": "{r.choice(PLACES)}"',
    ]
    fields += r.sample(extra, r.randint(2, 4))
    answer = "{\n  " + ",\n  ".join(fields) + "\n}"
    return Example("record", f"Write a JSON record for {name}, a {job} from {city} who likes {food}.", answer)


def _dialogue(r: random.Random) -> Example:
    first, second = r.sample(NAMES, 2)
    place, plan, food, day = r.choice(PLACES), r.choice(PLANS), r.choice(FOODS), r.choice(DAYS)
    greeting = r.choice(["Good morning", "Hello", "Welcome back"])
    turns = [
        (first, f"{greeting}, {second}! How are you today?"),
        (second, f"I am {r.choice(FEELINGS)}, thank you. Do you have a plan for {day}?"),
        (first, f"Yes, I want to {plan}. Will you come with me to the {place}?"),
        (
            second,
            r.choice(["Of course, I would love to.", "I am not sure, but I will try.", "Only if the sun shines."]),
        ),
        (first, r.choice([f"Then I will bring some {food} for us.", f"We could buy a {r.choice(THINGS)} there."])),
        (second, f"That sounds wonderful, I am already {r.choice(FEELINGS)}."),
        (second if r.random() < 0.5 else first, f"See you on {day}!"),
    ]
    if r.random() < 0.5:
        del turns[5]
    answer = "\n".join(f"{who}: {what}" for who, what in turns)
    return Example("dialogue", f"Write a dialogue of {first} and {second} about {day} and the {place}.", answer)


def _story(r: random.Random) -> Example:
    colour, animal, place, thing = r.choice(COLOURS), r.choice(ANIMALS), r.choice(PLACES), r.choice(THINGS)
    friend = r.choice([a for a in ANIMALS if a != animal])
    opening = r.choice(["Once upon a time", "Long ago", "Far away"])
    middle = [
        f'"What a beautiful {thing}!" said the {animal}.',
        f"It was {r.choice(COLOURS)} and very old.",
        f"A {r.choice(JOBS)} from {r.choice(CITIES)} had lost it on {r.choice(DAYS)}.",
        f"Suddenly the {friend} came out of the {r.choice(PLACES)}.",
    ]
    ending = [
        f"The {friend} was very {r.choice(FEELINGS)}, and they became good friends.",
        f"In the evening they shared some {r.choice(FOODS)} and went home.",
        f"From that day on the {animal} was never alone again.",
    ]
    sentences = [
        f"{opening} there was a {colour} {animal} who lived in the {place}.",
        f"One {r.choice(['morning', 'evening'])} the {animal} found a {thing} under a {r.choice(['tree', 'stone'])}.",
        *[sentence for sentence in middle if r.random() < 0.6],
        f"Then the {animal} showed the {thing} to the {friend}.",
        r.choice(ending),
    ]
    answer = " ".join(sentences) + "\nThe end."
    return Example("story", f"Tell a story of a {colour} {animal} and a {thing} in the {place}.", answer)


def _program(r: random.Random) -> Example:
    name, other = r.sample(VARIABLES, 2)
    value, rounds, step = r.randint(1, 9), r.randint(2, 4), r.randint(1, 3)
    verb, sign = r.choice([("grows", "+"), ("shrinks", "-")])
    code = [
        f"{name} = {value}",
        f"{other} = {step}",
        f"for i in range({rounds}):",
        f"    {name} = {name} {sign} {other}",
    ]
    lines = ["```", *code, f"    print({name})", "```", "The program prints:"]
    prompt = f"Write a loop of {rounds} rounds where {name} begins at {value} and {verb} by {step} as {other}."
    for i in range(rounds):
        value = value + step if sign == "+" else value - step
        lines.append(f"round {i + 1}: {name} is {value}")
    lines.append(f"At the end {name} {verb} to {value}.")
    return Example("program", prompt, "\n".join(lines))


def _problem(r: random.Random) -> Example:
    name, friend = r.sample(NAMES, 2)
    thing, colour, day = r.choice(THINGS), r.choice(COLOURS), r.choice(DAYS)
    have, more = r.randint(2, 9), r.randint(2, 9)
    left = have + more
    lines = [
        f"Step 1: On {day} {name} has {have} {colour} things of the kind {thing}.",
        f"Step 2: {friend} gives {more} more to {name}.",
        f"Step 3: We add both numbers: {have} + {more} = {left}.",
    ]
    if r.random() < 0.5:
        fewer = r.randint(1, 2)
        lines.append(f"Step 4: {name} gives {fewer} to a {r.choice(JOBS)}: {left} - {fewer} = {left - fewer}.")
        left -= fewer
    lines.append(f"The answer is {left}.")
    prompt = f"On {day} {name} has {have} of {colour} {thing} and gets {more} from {friend}. How many are there?"
    return Example("problem", prompt, "\n".join(lines))


def _record_2(r: random.Random) -> Example:
    name, city, job, colour, food = (r.choice(x) for x in (NAMES, CITIES, JOBS, COLOURS, FOODS))
    fields = [
        f'"person": {{"first_name": "{name}", "profession": "{job}"}}',
        f'"residence": {{"town": "{city}", "kind": "{r.choice(PLACES)}"}}',
        f'"favourites": {{"meal": "{food}", "object": "{r.choice(THINGS)}", "paint": "{colour}"}}',
    ]
    extra = [
        f'"available": ["{r.choice(DAYS)}"]',
        f'"companion": "{r.choice(COLOURS)} {r.choice(ANIMALS)}"',
        f'"state_of_mind": "rather {r.choice(FEELINGS)}"',
    ]
    fields += r.sample(extra, r.randint(1, 3))
    answer = "[\n" + ",\n".join("    {" + field + "}" for field in fields) + "\n]"
    return Example("record", f"Write a JSON record for {name}, a {job} from {city} who likes {food}.", answer)


def _dialogue_2(r: random.Random) -> Example:
    first, second = r.sample(NAMES, 2)
    place, plan, food, day = r.choice(PLACES), r.choice(PLANS), r.choice(FOODS), r.choice(DAYS)
    turns = [
        (first, f"Listen, {second}, what would you say if we {plan} on {day}?"),
        (second, f"I feel {r.choice(FEELINGS)} today. Where exactly should we meet, {first}?"),
        (first, f"Near the old {place}, where the {r.choice(JOBS)} sells {food}."),
        (second, r.choice(["Fine, count me in.", "Let me think about it.", "My sister will join us too."])),
        (first, f"Great! Please do not forget the {r.choice(COLOURS)} {r.choice(THINGS)}."),
    ]
    answer = "\n".join(f"[{who}] - {what}" for who, what in turns) + f"\n(They leave for the {place}.)"
    return Example("dialogue", f"Write a dialogue of {first} and {second} about {day} and the {place}.", answer)


def _story_2(r: random.Random) -> Example:
    colour, animal, place, thing = r.choice(COLOURS), r.choice(ANIMALS), r.choice(PLACES), r.choice(THINGS)
    friend = r.choice([a for a in ANIMALS if a != animal])
    middle = [
        f"Nobody in the {place} knew who had made the {thing}.",
        f"Some said that a {r.choice(JOBS)} had hidden it there on a {r.choice(DAYS)}.",
        f"The {friend} only laughed and ate its {r.choice(FOODS)}.",
    ]
    sentences = [
        f"In a quiet {place} a {colour} {animal} kept a secret: the {thing}.",
        f"Every {r.choice(DAYS)} the {animal} polished the {thing} until it shone.",
        *[sentence for sentence in middle if r.random() < 0.7],
        f"At last the {animal} gave the {thing} away, because the {friend} needed it more.",
        f"And the {place} felt {r.choice(FEELINGS)} again.",
    ]
    answer = "Title: The " + thing + "\n" + " ".join(sentences)
    return Example("story", f"Tell a story of a {colour} {animal} and a {thing} in the {place}.", answer)


Maker = Callable[[random.Random], Example]
FAMILIES: dict[str, Maker] = {
    "record": _record,
    "dialogue": _dialogue,
    "story": _story,
    "program": _program,
    "problem": _problem,
    **WORKED,
}
REVISION_2: dict[str, Maker] = {"record": _record_2, "dialogue": _dialogue_2, "story": _story_2}
_MOST_REPEATED = 1000  # in a row, before a family counts as exhausted
EASY = ("record", "dialogue", "story")  # what a target of under a million parameters learns without loops


def examples(
    seed: int,
    count: int,
    exclude: frozenset[str] = frozenset(),
    *,
    families: Sequence[str] = EASY,
    revision_2: float = 0.0,
) -> Iterator[Example]:
    """At most `count` examples with different prompts, families in turn, none whose prompt is in `exclude`.

    revision_2: the share of the answers that are worded as in revision 2, in the families that have it. Ends early when
    a family is exhausted.
    """
    r = random.Random(seed)
    seen = set(exclude)
    made, repeated = 0, 0
    while made < count:
        family = families[made % len(families)]
        makers = REVISION_2 if revision_2 and r.random() < revision_2 and family in REVISION_2 else FAMILIES
        example = makers[family](r)
        if example.prompt in seen:
            repeated += 1
            if repeated > _MOST_REPEATED:
                return
            continue
        seen.add(example.prompt)
        made, repeated = made + 1, 0
        yield example
