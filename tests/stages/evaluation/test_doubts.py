"""Figures that cannot be: each is named, and the real gate does not decide on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from draftsmith.stages.evaluation.gate_rules import CHAMPION, PLAIN, Decision, GateConfig, compared, decide
from draftsmith.stages.evaluation.speed_table import log_ratios, speed_table
from draftsmith.stages.evaluation.timed_runs import Setting
from draftsmith.stages.evaluation.validity import FEWEST_PROMPTS, doubts, machine_errors
from draftsmith.stages.evaluation.verdicts import verdicts

TAU = {PLAIN: 1.0, CHAMPION: 2.0, "opd": 2.4}
WHERE: dict[str, Any] = {"temperature": 0.0, "concurrency": 1}
Turn = dict[str, Any]


def measured(rounds: int = 6, prompts: int = 8, noise: float = 0.01, seed: int = 0) -> list[Turn]:
    """Turns of a steady, idle machine on which a verify step costs 1.3 steps of plain decoding."""
    rng = np.random.default_rng(seed)
    found = []
    for round in range(rounds):
        for order, (arm, tau) in enumerate(TAU.items()):
            tokens = 60 * prompts
            steps = 0 if arm == PLAIN else round_up((tokens - prompts) / tau)
            wall = 0.04 * (steps * 1.3 or tokens) * float(np.exp(rng.normal(0, noise)))
            found.append(
                {
                    "round": round, "order": order, "arm": arm, "prompts": prompts, "tokens": tokens, "block_size": 4,
                    "wall_seconds": wall, "draft_seconds": 0.0, "verify_seconds": 0.0, "verify_steps": steps,
                    "others_share": 0.02, **WHERE,
                }
            )  # fmt: skip
    return found


def round_up(value: float) -> int:
    return int(-(-value // 1))


def evaluation(turns: list[Turn]) -> dict[str, Any]:
    """What an evaluation says of them, with a tau that is measurably better."""
    ratios = log_ratios(turns, [], [("opd", PLAIN), ("opd", CHAMPION)], {})
    speeds = [compared("speed", arm, other, found, **WHERE) for (arm, other), found in ratios.items()]
    better = {"kind": "tau", "arm": "opd", "other": CHAMPION, "value": 0.4, "error": 0.01, "units": 40, "degrees": 39.0}
    gain = {"value": 0.2, "error": 0.005, "units": 40, "degrees": 39.0}
    return {
        **WHERE,
        "drafters": {CHAMPION: {"tau": 2.0}, "opd": {"tau": 2.4}},
        "compared": [*speeds, {**better, "set": None, "base": 2.0, "gain": gain}],
        "exactness": {"fp32_prompts": 4, "fp32_identical": 4},
        "verdicts": verdicts({}, {("opd", CHAMPION): ratios["opd", CHAMPION]}, turns[0]["prompts"]),
        "speed": speed_table(turns, [], {}),
        "doubts": doubts(turns, [], [Setting(**WHERE)]),
    }


def gate(turns: list[Turn], **config: Any) -> Decision:
    return decide(evaluation(turns), GateConfig(**config))


def changed(turns: list[Turn], **by_arm: Any) -> list[Turn]:
    """With the wall time of an arm's turns times what a function of the round says."""
    return [
        turn | {"wall_seconds": turn["wall_seconds"] * by_arm.get(turn["arm"], lambda _: 1.0)(turn["round"])}
        for turn in turns
    ]


def unjudged(decision: Decision) -> list[str]:
    return [rule.name for rule in decision.rules if not rule.judged]


SPEEDS = ["speed-up", "speed at temperature 0, 1 in flight"]


def test_a_steady_machine_leaves_no_doubt_and_the_gate_decides() -> None:
    assert evaluation(measured())["doubts"] == []
    assert gate(measured()).outcome == "promoted"
    slower = changed(measured(), opd=lambda _: 1.5)
    assert gate(slower).outcome == "refused"


def test_a_speed_up_above_the_served_tau_is_not_decided_on() -> None:
    """Plain decoding was slowed by a neighbour, in all its turns: no interval shows it."""
    turns = changed(measured(), plain=lambda _: 2.0)
    decision = gate(turns)
    assert decision.outcome == "inconclusive"
    assert "the speed-up of opd was measured as 3.7" in decision.sentence() and "2.40" in decision.sentence()
    assert unjudged(decision) == SPEEDS
    assert gate(turns, judge_speed=False).outcome == "promoted", "tau does not hang on the machine"


def test_repetitions_that_differ_leave_a_rule_inconclusive_that_would_fail() -> None:
    turns = changed(measured(), opd=lambda round: 1 + 0.5 * (round % 2))
    assert ("noise", ("opd",)) in [(doubt["kind"], doubt["arms"]) for doubt in evaluation(turns)["doubts"]]
    assert gate(turns, min_speedup=1.6).outcome == "inconclusive"
    assert gate(changed(measured(), opd=lambda _: 1.5), min_speedup=1.6).outcome == "refused"
    faster = changed(turns, **{CHAMPION: lambda _: 2.0})
    assert gate(faster, min_speedup=0.8).outcome == "promoted", "what passes in spite of noise passes"
    together = changed(measured(), **{arm: lambda round: 1 + 0.5 * (round % 2) for arm in TAU})
    assert evaluation(together)["doubts"] == [], "what happens to all arms of a round cancels"


def test_a_busy_machine_is_reported_and_its_ratios_hold() -> None:
    busy = [turn | {"others_share": 0.48} for turn in measured()]
    assert [doubt["kind"] for doubt in evaluation(busy)["doubts"]] == ["load"]
    assert gate(busy).outcome == "promoted"


def by_prompt(noise: float, rounds: int = 2, prompts: int = 12, seed: int = 0) -> tuple[list[Turn], list[Turn]]:
    """Turns and requests of arms that alternate prompt by prompt."""
    rng = np.random.default_rng(seed)
    rows = []
    for round in range(rounds):
        for prompt in range(prompts):
            for arm, tau in TAU.items():
                seconds = 2.0 / tau * float(np.exp(rng.normal(0, noise) + 0.1 * (prompt % 3)))
                rows.append({**WHERE, "round": round, "arm": arm, "prompt_id": str(prompt), "latency_seconds": seconds})
    turns = [turn | {"batches": turn["prompts"]} for turn in measured(rounds, prompts)]
    return turns, rows


@pytest.mark.parametrize(("noise", "expected"), [(0.03, set()), (0.3, {"noise"})])
def test_noise_is_what_differs_between_repetitions_of_a_prompt(noise: float, expected: set[str]) -> None:
    turns, rows = by_prompt(noise)
    assert {doubt["kind"] for doubt in doubts(turns, rows, [Setting(**WHERE)])} == expected
    errors = machine_errors(turns, rows)
    assert errors.keys() == {CHAMPION, "opd"}
    assert all(error == pytest.approx(noise * (2 / 24) ** 0.5, rel=0.5) for error in errors.values())


def test_a_doubt_is_of_its_arms_and_its_setting() -> None:
    """Of another drafter's speed, or of another load, the gate thinks nothing."""
    found = evaluation(measured())
    doubt = {"kind": "tau", "said": "it cannot be", "arms": ("opd",), **WHERE}
    for changed_to, doubted in (
        ({}, SPEEDS),
        ({"arms": (CHAMPION,)}, SPEEDS[1:]),
        ({"arms": ()}, SPEEDS),
        ({"arms": ("control",)}, []),
        ({"concurrency": 8}, []),
        ({"temperature": 0.7}, []),
    ):
        assert unjudged(decide(found | {"doubts": [doubt | changed_to]}, GateConfig())) == doubted, changed_to


def test_too_few_prompts_or_turns_are_not_decided_on() -> None:
    few = gate(measured(prompts=FEWEST_PROMPTS - 1))
    assert few.outcome == "inconclusive" and "3 prompts a turn say little of others" in few.sentence()
    short = gate(measured(rounds=4))
    assert short.outcome == "inconclusive" and "4 turns, 5 are needed" in short.sentence()
    found = evaluation(measured())
    units = [each | ({"units": 3} if each["kind"] == "tau" else {}) for each in found["compared"]]
    decision = decide(found | {"compared": units}, GateConfig())
    assert (decision.outcome, unjudged(decision)) == ("inconclusive", ["tau"])
    assert "3 prompts cannot tell" in decision.sentence()


def test_turns_with_fewer_prompts_than_should_be_in_flight_say_so() -> None:
    for in_flight, said in (
        (4, []),
        (5, ["8 prompts a turn, 5 in flight, say little of others (10 are needed: raise evaluation.speed_prompts)"]),
        (16, ["8 prompts a turn are never 16 in flight (raise evaluation.speed_prompts)"]),
    ):
        turns = [turn | {"concurrency": in_flight} for turn in measured(prompts=8)]
        assert [doubt["said"] for doubt in doubts(turns, [], [Setting(0.0, in_flight)])] == said


def test_what_is_broken_beside_it_is_refused_all_the_same() -> None:
    found = evaluation(changed(measured(), plain=lambda _: 2.0))
    lossy = found | {"exactness": {"fp32_prompts": 4, "fp32_identical": 3}}
    assert decide(lossy, GateConfig()).outcome == "refused"


def test_several_requests_at_a_time_are_bounded_by_the_best_of_them() -> None:
    """The longest answer decides when a turn ends, and its tau may be above the mean."""
    turns = [turn | {"concurrency": 8} for turn in changed(measured(prompts=16), plain=lambda _: 1.6)]
    best = {**WHERE, "concurrency": 8, "arm": "opd", "tokens": 61, "verify_steps": 20}
    setting = [Setting(0.0, 8)]
    assert [doubt["kind"] for doubt in doubts(turns, [], setting)] == ["tau", "tau"]
    assert [doubt["arms"] for doubt in doubts(turns, [best], setting)] == [(CHAMPION,)]


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_equal_repetitions_are_seldom_doubted(noise: float) -> None:
    """Of either drafter, at any of its figures: what a good measurement loses to these checks."""
    repetitions = 400
    wrong = sum(bool(doubts(measured(noise=noise, seed=seed), [], [Setting(**WHERE)])) for seed in range(repetitions))
    assert wrong / repetitions <= 0.03
