"""The speed table and the comparison of outputs, against values computed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from draftsmith.stages.data.stored_prompts import Prompt
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.speed_embedded import compare_with_plain, exactness
from draftsmith.stages.evaluation.speed_table import (
    alternates,
    log_ratios,
    speed_by_slice,
    speed_metrics,
    speed_tables,
)
from draftsmith.stages.evaluation.timed_runs import Setting, TimedRun, requests_for, settings_of
from draftsmith.stages.evaluation.verdicts import verdicts
from draftsmith.stages.replay.steps import recorded_steps
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams

GREEDY_SETTING = Setting(0.0, 2)


def answer(
    prompt: str, tokens: int, seconds: float = 1.0, steps: int = 0, *, first: float = float("nan"),
    accepted: list[int] | None = None,
) -> Completion:  # fmt: skip
    """The draft takes a quarter of the time, verification a half."""
    return Completion(
        Request(prompt, [1], 99),
        [7] * tokens,
        "length",
        recorded_steps(tokens + 1, [(i, n, [0, 0, 0], None) for i, n in enumerate(accepted or [])]),
        verify_steps=steps,
        seconds=seconds,
        first_token_seconds=first,
        draft_seconds=seconds / 4 if steps else 0.0,
        verify_seconds=seconds / 2 if steps else 0.0,
    )


def row(arm: str, given: Completion, round: int = 0, setting: Setting = GREEDY_SETTING) -> dict[str, Any]:
    return TimedRun("embedded", round, 0, arm, 4, setting).request_row(given)


def turn(
    arm: str,
    answers: list[Completion],
    wall: float,
    round: int = 0,
    setting: Setting = GREEDY_SETTING,
    batches: int = 1,
) -> dict[str, Any]:
    return TimedRun("embedded", round, 0, arm, 4, setting).row(answers, wall, math.nan, batches)


def tables(
    rounds: Iterable[Mapping[str, Sequence[float]]], setting: Setting = GREEDY_SETTING, batches: int = 1,
    wall: Callable[[Sequence[float]], float] = sum, tokens: Sequence[int] = (12,) * 4,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Return turns and rows. rounds: by arm the seconds of the prompts a, b, …"""
    turns, rows = [], []
    for round, of_arms in enumerate(rounds):
        for arm, seconds in of_arms.items():
            answers = [answer(prompt, n, s) for prompt, n, s in zip("abcd", tokens, seconds, strict=False)]
            turns.append(turn(arm, answers, wall(seconds), round, setting, batches))
            rows += [row(arm, each, round, setting) for each in answers]
    return turns, rows


def jackknife(seconds: Mapping[str, Sequence[float]], groups: Sequence[Sequence[int]]) -> float:
    """Return the error of the logarithm of sums, over groups of prompts that are omitted together."""
    total = {arm: np.array(s) for arm, s in seconds.items()}
    left = [np.log(np.delete(total["plain"], g).sum() / np.delete(total["sft"], g).sum()) for g in groups]
    return float(np.sqrt((len(groups) - 1) / len(groups) * np.sum((np.array(left) - np.mean(left)) ** 2)))


def test_speed_up_of_a_prompt_set_is_that_of_its_requests() -> None:
    _, rows = tables({"plain": (4.0, 2.0, 9.0, 9.0), "sft": (2.0, 1.0 + round, 9.0, 9.0)} for round in range(3))
    labels = {"a": ("chat",), "b": ("code", "language:de"), "c": ("chat",), "d": ("chat",)}
    found = speed_by_slice(rows, labels, {}, alternating=False)
    assert found["language:de"] == found["code"]
    assert found["chat"]["sft"].speedup == pytest.approx(22 / 20)
    low, high = found["chat"]["sft"].speedup_low, found["chat"]["sft"].speedup_high
    assert low is not None and high is not None and low < 1 < high, "all rounds are alike, prompts are not"
    assert found["code"]["sft"].speedup == pytest.approx((2 / 1 * 2 / 2 * 2 / 3) ** (1 / 3))
    assert found["code"]["sft"].speedup_low is found["code"]["sft"].speedup_high is None, "a single prompt"
    assert speed_by_slice([row("plain", answer("a", 3, 0.0))], {"a": ("chat",)}, {}, alternating=False) == {}, (
        "an engine that does not say"
    )


def test_speed_table_by_hand() -> None:
    plain = [answer("a", 10, 4.0), answer("b", 30, 4.0)]
    sft = [answer("a", 11, 1.0, 2, accepted=[3, 3]), answer("b", 10, 1.0, 3, accepted=[1, 0, 3])]
    rows = [row(arm, given) for arm, answers in (("plain", plain), ("sft", sft)) for given in answers]
    compare_with_plain(rows, sampled=False)
    table = speed_metrics([turn("plain", plain, 4.0), turn("sft", sft, 2.0)], rows, {})
    assert table["plain"].to_json() == {
        "tokens_per_s": 10.0, "turns": 1, "prompts": 2, "request_tokens_per_s_median": (2.5 + 7.5) / 2,
    }  # fmt: skip
    found = table["sft"]
    assert found.tokens_per_s == 10.5
    assert found.speedup == pytest.approx(1.05)
    assert found.speedup_low is found.speedup_high is None  # of a single turn
    assert found.ratios == {}
    assert found.tau_served == (21 - 2) / 5
    assert (found.draft_share, found.verify_share, found.identical_share) == (0.25, 0.5, 0.0)
    assert (found.draft_ms_per_step, found.verify_ms_per_step) == (100, 200)
    assert found.accepted_histogram == [1, 1, 0, 3]
    assert "first_token_s_median" not in found.to_json()


def test_runs_are_the_repetitions_and_paired_by_round() -> None:
    """A round in which everything is ten times as slow changes no ratio."""
    turns = []
    for round, (slow, factor) in enumerate([(1.0, 2.0), (10.0, 2.1), (1.0, 1.9), (3.0, 2.0)]):
        turns += [
            turn("plain", [answer("a", 60)], 6.0 * slow, round),
            turn("sft", [answer("a", 60, steps=20)], 6.0 * slow / factor, round),
            turn("opd", [answer("a", 60, steps=20)], 6.0 * slow / factor / 1.5, round),
        ]
    found = speed_metrics(turns[::-1], [], {})  # in any order
    logs = np.log([2.0, 2.1, 1.9, 2.0])
    low, high = stats.t.interval(0.95, 3, loc=logs.mean(), scale=logs.std(ddof=1) / 2)
    assert found["sft"].speedup == pytest.approx(np.exp(logs.mean()))
    assert (found["sft"].speedup_low, found["sft"].speedup_high) == pytest.approx((np.exp(low), np.exp(high)))
    assert found["opd"].ratios["sft"].to_json() == pytest.approx({"value": 1.5, "low": 1.5, "high": 1.5})
    assert found["sft"].turns == 4 and found["sft"].tau_served == (4 * 60 - 4) / 80


def test_an_interval_has_the_error_of_the_rounds_and_that_of_the_prompts() -> None:
    """Compare with scipy's, and numpy's over logarithms of sums without one prompt."""
    seconds = {"plain": [4.0, 2.0, 9.0, 6.0], "sft": [2.0, 1.5, 3.0, 4.0]}
    rounds = [{**seconds, "sft": [each * slow for each in seconds["sft"]]} for slow in (1.0, 1.1, 0.9)]
    turns, rows = tables(rounds, Setting(0.0, 1))
    (alone,) = log_ratios(turns, [], [("sft", "plain")], {}).values()
    assert (alone.units, alone.degrees) == (3, 2)
    assert alone.error == pytest.approx(stats.sem(np.log([1.0, 1.1, 0.9])))

    (both,) = log_ratios(turns, rows, [("sft", "plain")], {}).values()
    assert (both.value, both.units) == (alone.value, 3)
    assert both.error == pytest.approx(np.hypot(alone.error, jackknife(seconds, [[0], [1], [2], [3]])))
    assert both.degrees > 2
    together = {"a": "first", "b": "first"}  # two turns of a conversation
    (both,) = log_ratios(turns, rows, [("sft", "plain")], together).values()
    assert both.error == pytest.approx(np.hypot(alone.error, jackknife(seconds, [[0, 1], [2], [3]])))
    (single,) = log_ratios(turns, rows, [("sft", "plain")], dict.fromkeys("abcd", "one")).values()
    assert single.interval() is None
    assert verdicts({}, {("sft", "plain"): single}, 4)[0].different is None


def test_where_arms_alternate_the_prompts_are_the_repetitions() -> None:
    """Compare with numpy's jackknife of logarithms of sums over both rounds; a slow prompt weighs more."""
    seconds = {"plain": [[4.0, 2.0, 9.0], [4.4, 2.0, 90.0]], "sft": [[2.0, 1.5, 3.0], [2.1, 1.4, 30.0]]}
    rounds = [{arm: of_rounds[round] for arm, of_rounds in seconds.items()} for round in range(2)]
    turns, rows = tables(rounds, Setting(0.0, 1), batches=3)
    assert alternates(turns)
    (found,) = log_ratios(turns, rows, [("sft", "plain")], {}).values()
    sums = {arm: np.sum(of_rounds, axis=0) for arm, of_rounds in seconds.items()}
    assert found.value == pytest.approx(np.log(sums["plain"].sum() / sums["sft"].sum()))
    assert found.error == pytest.approx(jackknife(sums, [[0], [1], [2]]))
    assert found.units == 3
    of_chat = speed_by_slice(rows, dict.fromkeys("abc", ("chat",)), {}, alternating=True)["chat"]["sft"]
    assert of_chat.speedup == pytest.approx(np.exp(found.value))
    assert not alternates([{**turns[0], "concurrency": 4}]), "several in flight have rounds"


def test_with_several_in_flight_the_slowest_request_decides_the_error() -> None:
    """Three of four short prompts are drafted twice as fast, the long one half as fast: by their sums it is one prompt
    of four, but only it decides how long a turn takes if it is drawn."""
    errors = {}
    for in_flight in (1, 4):
        rounds = [{"plain": [1.0, 1.0, 1.0, 2.0], "sft": [0.5, 0.5, 0.5, 4.0]}] * 5
        turns, rows = tables(rounds, Setting(0.0, in_flight), wall=sum if in_flight == 1 else max)
        (found,) = log_ratios(turns, rows, [("sft", "plain")], {}).values()
        errors[in_flight] = found.error
        (of_one,) = log_ratios(turns, rows, [("sft", "plain")], dict.fromkeys("abcd", "one")).values()
        assert of_one.interval() is None
    # drawn with a chance of 1 - (3/4)^4: the logarithm is -log 2 then, else log 2
    chance = 1 - 0.75**4
    assert errors[4] == pytest.approx(2 * math.log(2) * math.sqrt(chance * (1 - chance) * 4 / 3), rel=0.1)
    assert errors[1] < errors[4]


def test_a_prompt_that_outweighs_all_others_is_inconclusive() -> None:
    """An answer that runs to its limit among short ones: by Student's t of half a degree of freedom the speed-up lies
    between 1e-45 and 1e45, and that of a report of six verdicts beyond what a float holds."""
    rounds = [
        {"plain": [80.0, 1.0], "sft": [20.0 * slow, 0.9 * slow], "opd": [16.0 * slow, 0.9 * slow]}
        for slow in (1.0, 1.1, 0.9, 1.0, 1.0)
    ]
    turns, rows = tables(rounds, tokens=(4000, 50))
    found = log_ratios(turns, rows, [("sft", "plain"), ("opd", "sft")], {})
    assert [each.interval() for each in found.values()] == [None, None]
    assert [each.different for each in verdicts({}, found, 2)] == [None, None]
    assert speed_metrics(turns, rows, {})["sft"].speedup_high is None


def test_latencies_are_quantiles_over_requests() -> None:
    answers = [answer(str(i), 10, 2.0, first=0.1 * (i + 1)) for i in range(21)]
    found = speed_metrics([turn("plain", answers, 9.0)], [row("plain", each) for each in answers], {})["plain"]
    assert found.first_token_s_median == pytest.approx(1.1)
    assert found.first_token_s_p95 == pytest.approx(2.0)
    assert found.request_tokens_per_s_median == 5.0


def test_settings_do_not_mix() -> None:
    settings = [GREEDY_SETTING, Setting(0.7, 2), Setting(0.7, 16)]
    turns = [
        turn(arm, [answer("a", 10)], seconds / (i + 1), setting=setting)
        for i, setting in enumerate(settings)
        for arm, seconds in (("plain", 1.0), ("sft", 0.5 - 0.1 * i))
    ]
    rows = [row("sft", answer("a", 10, float(i + 1)), setting=setting) for i, setting in enumerate(settings)]
    found = speed_tables(turns, rows, settings, {})
    assert [(f.temperature, f.concurrency) for f in found] == [(0.0, 2), (0.7, 2), (0.7, 16)]
    assert [f.arms["plain"].tokens_per_s for f in found] == pytest.approx([10, 20, 30])
    assert [f.arms["sft"].speedup for f in found] == pytest.approx([2, 2.5, 10 / 3])
    rates = [f.arms["sft"].request_tokens_per_s_median for f in found]
    assert rates == pytest.approx([10, 5, 10 / 3])


def test_outputs_are_compared_with_those_of_the_same_round_and_setting() -> None:
    hot = Setting(1.0, 2)
    rows = [
        row("plain", answer("a", 5)), row("sft", answer("a", 5)), row("opd", answer("a", 4)),
        row("plain", answer("a", 3), 1), row("sft", answer("a", 5), 1),
        row("plain", answer("a", 5), setting=hot), row("sft", answer("a", 5), setting=hot),
    ]  # fmt: skip
    compare_with_plain(rows, sampled=False)
    assert [r["identical"] for r in rows] == [None, True, False, None, False, None, None]
    assert [r["first_difference"] for r in rows] == [-1, -1, 4, -1, 3, -1, -1]
    rows[2]["margin"], rows[4]["margin"] = 0.5, np.nan
    assert exactness(rows, "float32").to_json() == {
        "serving_dtype": "float32",
        "identical_share": 1 / 3, "compared_outputs": 3, "median_margin": 0.5, "largest_margin": 0.5,
    }  # fmt: skip
    compare_with_plain(rows, sampled=True)
    assert rows[-1]["identical"] is True
    assert exactness([], "float32").identical_share is None


def test_every_arm_gets_the_same_requests_at_every_setting() -> None:
    config = EvaluationConfig.model_validate(
        {"concurrency": [1, 16], "temperatures": [0, 0.7], "sampling": {"max_new_tokens": 9, "top_p": 0.9, "top_k": 20}}
    )
    settings = settings_of(config)
    assert settings == [Setting(0, 1), Setting(0, 16), Setting(0.7, 1), Setting(0.7, 16)]
    prompts = [Prompt("a", [1, 2]), Prompt("b", [3])]
    (a, b), (_, hot) = requests_for(prompts, config, settings[0], 5), requests_for(prompts, config, settings[2], 5)
    assert (a.prompt_ids, a.max_new_tokens, a.sampling) == ([1, 2], 9, GREEDY)
    assert hot == Request("b", [3], 9, SamplingParams(0.7, 0.9, 20), b.seed) and a.seed != b.seed
    assert requests_for(prompts, config, settings[0], 5, max_new=4)[0].max_new_tokens == 4
    later, _ = requests_for(prompts, config, settings[2], 5, round=1)
    assert later.seed != a.seed, "what arms draw by luck must not be the same in every round"
    assert settings_of(EvaluationConfig()) == [Setting(0.0, 1)]
