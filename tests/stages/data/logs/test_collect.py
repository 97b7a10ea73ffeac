"""The likelihood check on real answers of a target, at their own and at other sampling."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest

from draftsmith.stages.data.logs.collect import check_likelihood
from draftsmith.stages.target.sampling import SamplingParams
from tests.stages.bench import Bench

COUNT = 40
Answers = list[tuple[list[int], list[int]]]  # prompt and response


def answers(bench: Bench, temperature: float) -> Answers:
    sampling = SamplingParams(temperature)
    found = bench.answers(bench.requests(COUNT, sampling=sampling), slots=COUNT).values()
    return [(each.request.prompt_ids, each.response_ids) for each in found if len(each.response_ids) > 8]


@pytest.fixture(scope="module")
def greedy(bench: Bench) -> Answers:
    return answers(bench, 0.0)


@pytest.fixture(scope="module")
def sampled(bench: Bench) -> Answers:
    return answers(bench, 1.0)


def reasons(bench: Bench, rows: Answers, temperature: float) -> Counter[str]:
    return Counter(check_likelihood(bench.target, *row, SamplingParams(temperature)) for row in rows)


def test_the_targets_own_answers_are_likely(bench: Bench, greedy: Answers, sampled: Answers) -> None:
    assert reasons(bench, greedy, 0.0) == {"": len(greedy)}
    assert reasons(bench, sampled, 1.0) == {"": len(sampled)}


def test_answers_at_another_temperature_are_found(bench: Bench, sampled: Answers) -> None:
    among_greedy = reasons(bench, sampled, 0.0)  # what was sampled is often the best token everywhere
    assert among_greedy[""] < 2 * len(sampled) / 3, among_greedy
    hot = reasons(bench, answers(bench, 3.0), 1.0)
    assert hot["improbable"] > COUNT / 2, hot


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_other_text_and_cut_answers_are_found(
    bench: Bench, greedy: Answers, sampled: Answers, temperature: float
) -> None:
    made = random.Random(0)
    rows = greedy if temperature == 0 else sampled
    size = bench.target.info.vocab_size

    def flagged(change: Callable[[list[int]], list[int]]) -> float:
        found = reasons(bench, [(prompt, change(response)) for prompt, response in rows], temperature)
        return 1 - found[""] / len(rows)

    assert flagged(lambda response: [made.randrange(5, size) for _ in response]) == 1.0
    assert flagged(lambda response: response[::-1]) > 0.9
    assert flagged(lambda response: response[len(response) // 3 :]) > 0.8


def test_one_unlikely_token_in_a_long_greedy_answer_is_tolerated(bench: Bench, greedy: Answers) -> None:
    """A token that the target would not have chosen: the text was tokenised differently there."""
    long = [(prompt, response) for prompt, response in greedy if len(response) > 40][:5]
    assert long
    prompt, response = long[0]
    last = [*response[:-1], (response[-1] + 7) % bench.target.info.vocab_size]
    assert check_likelihood(bench.target, prompt, last, SamplingParams()) == ""
