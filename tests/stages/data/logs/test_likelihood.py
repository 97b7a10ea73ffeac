"""The target's log-probs tell its own answers from others, and what these look like; too many stop stage `logs`."""

from __future__ import annotations

import copy
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError
from draftsmith.stages.data.chat_template import TemplateInverter
from draftsmith.stages.data.logs.likelihood import check_likelihood, foreign_error, read_answer
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.bench import Bench
from tests.stages.data.logs.logs_run import Logs, Row, as_ids, counts, set_aside
from tests.testbed.target import revision_folder

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
    # Without its first third an answer may still be likely, above all a sampled one. A run stops at far fewer.
    assert flagged(lambda response: response[len(response) // 3 :]) > 0.5


def test_one_unlikely_token_in_a_long_greedy_answer_is_tolerated(bench: Bench, greedy: Answers) -> None:
    """A token that the target would not have chosen: the text was tokenised differently there."""
    long = [(prompt, response) for prompt, response in greedy if len(response) > 40][:5]
    assert long
    prompt, response = long[0]
    last = [*response[:-1], (response[-1] + 7) % bench.target.info.vocab_size]
    assert check_likelihood(bench.target, prompt, last, SamplingParams()) == ""


def error_of(target: Target, rows: Answers, temperature: float = 0.0) -> str:
    config = LogsConfig(paths=["a"], temperature=temperature)
    return foreign_error(target, config, [read_answer(target, *row, config.sampling) for row in rows]) or ""


def answered(
    bench: Bench, theirs: Target | None = None, prompts: Sequence[list[int]] = (), temperature: float = 0.0
) -> Answers:
    """Return the prompts of the bench, and answers of another target or to other prompts."""
    own = [prompt.token_ids for prompt in bench.prompts[:COUNT]]
    sampling = SamplingParams(temperature)
    asked = [Request(f"{i:02}", ids, 80, sampling, seed=i) for i, ids in enumerate(prompts or own)]
    done = EmbeddedEngine(theirs or bench.target, slots=COUNT, capacity=256).generate(asked)
    found = {each.request.request_id: each.response_ids for each in done}
    return [(ids, found[f"{i:02}"]) for i, ids in enumerate(own) if len(found[f"{i:02}"]) > 8]


def plain_prompts(bench: Bench) -> list[list[int]]:
    """Return the prompts of the bench without the chat template."""
    inverter, tokenizer = TemplateInverter(bench.target.tokenizer, {}), bench.target.tokenizer
    texts = [inverter.messages(prompt.token_ids)[0]["content"] for prompt in bench.prompts[:COUNT]]
    return [list(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_of_another_revision_look_like_another_models(bench: Bench, temperature: float) -> None:
    revision = Target.from_source(revision_folder(), dtype="float32")
    found = error_of(bench.target, answered(bench, revision, temperature=temperature), temperature)
    assert "another model's, or another revision's. Set target" in found and "logs.max_foreign_share 0.05" in found


def test_answers_at_another_temperature_name_it(bench: Bench, greedy: Answers, sampled: Answers) -> None:
    assert re.search(r"sampled at a temperature of about (0\.8|1|1\.2), or given by", error_of(bench.target, sampled))
    assert "They look greedy. Set logs.temperature: 0." in error_of(bench.target, greedy, 3.0)
    assert error_of(bench.target, greedy) == error_of(bench.target, sampled, 1.0) == ""


def test_answers_after_another_chat_template_name_the_switch_or_plain_text(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = answered(bench, prompts=plain_prompts(bench))
    assert "plain text, without the chat template. Log token ids" in error_of(bench.target, rows)
    switched = copy.deepcopy(bench.target.tokenizer)
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    switched.chat_template = (
        f"{{% if enable_thinking is false %}}{bare}{{% else %}}{switched.chat_template}{{% endif %}}"
    )
    monkeypatch.setattr(bench.target, "tokenizer", switched)
    assert "Set logs.chat_template_kwargs: {enable_thinking: false}" in error_of(bench.target, rows)


def test_answers_without_their_beginning_say_so(bench: Bench, greedy: Answers) -> None:
    cut = [(prompt, answer[len(answer) // 3 :]) for prompt, answer in greedy]
    assert "or without their beginning" in error_of(bench.target, cut)


def test_a_run_stops_at_foreign_answers_unless_they_are_few_or_allowed(logs: Logs) -> None:
    own = [as_ids(row) for row in logs.answers[:40]]
    made = random.Random(0)

    def mixed(count: int) -> list[Row]:
        texts = [row["completion_token_ids"][:-1] for row in own[:count]]  # without the stop token
        foreign = [
            row | {"completion_token_ids": made.sample(ids, len(ids))}
            for row, ids in zip(own[:count], texts, strict=True)
        ]
        return [*foreign, *own[count:]]

    with pytest.raises(DraftsmithError, match=r"logs: 12 of 40 answers \(30%; 17% to 47% .* look like") as caught:
        logs.run(mixed(12))
    assert caught.value.exit_code == EXIT_USER_ERROR
    allowed = logs.run(mixed(12), max_foreign_share=0.2)  # 17 % at least
    assert sum(counts(allowed)["improbable"].values()) == 12
    few = logs.run(mixed(4))
    assert any(line.startswith("warning: 4 of 40 answers (10%; 3% to 24%") for line in few.logs)
    assert not set_aside(few)
