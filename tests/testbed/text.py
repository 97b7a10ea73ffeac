"""Procedural text of three easy families (JSON records, dialogues, stories): prompts with their answers, seeded.

Answers draw their slots from small lists and repeat them (a record's city is the prompt's, a story's hero comes back in
every sentence), so that a model of under a million parameters learns well-formed text with parts that are certain and
parts that are not: what a drafter needs to be tested on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass


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
PLANS = [
    "visit the museum",
    "walk in the park",
    "cook some dinner",
    "watch the boats",
    "play a game",
    "repair my bicycle",
    "paint a picture",
]


@dataclass(frozen=True)
class Example:
    """One request and the answer that the test bed's target is taught."""

    family: str
    prompt: str
    answer: str


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


FAMILIES: dict[str, Callable[[random.Random], Example]] = {"record": _record, "dialogue": _dialogue, "story": _story}


def examples(seed: int, count: int, exclude: frozenset[str] = frozenset()) -> Iterator[Example]:
    """`count` examples with different prompts, families in turn, none whose prompt is in `exclude`."""
    r = random.Random(seed)
    makers = list(FAMILIES.values())
    seen = set(exclude)
    made = 0
    while made < count:
        example = makers[made % len(makers)](r)
        if example.prompt not in seen:
            seen.add(example.prompt)
            made += 1
            yield example
