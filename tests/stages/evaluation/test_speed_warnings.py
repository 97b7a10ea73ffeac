"""Speed warnings: each implausible speed is named, and the gate finds it inconclusive."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.results.evaluation import CHAMPION, PLAIN, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.evaluation import gate as gate_stage
from draftsmith.stages.evaluation.gate import GateConfig
from draftsmith.stages.evaluation.repetitions import machine_errors
from draftsmith.stages.evaluation.speed_table import log_ratios, speed_metrics
from draftsmith.stages.evaluation.speed_warnings import FEWEST_PROMPTS, speed_warnings
from draftsmith.stages.evaluation.timed_runs import Setting
from draftsmith.stages.evaluation.verdicts import comparison, verdicts

TAU = {PLAIN: 1.0, CHAMPION: 2.0, "opd": 2.4}
WHERE: dict[str, Any] = {"temperature": 0.0, "concurrency": 1}
Turn = dict[str, Any]


def measured(rounds: int = 6, prompts: int = 8, noise: float = 0.01, seed: int = 0) -> list[Turn]:
    """Return timed runs on an idle machine where a verify step costs 1.3 steps without a drafter."""
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
    """Return the evaluation of these runs, with a tau that is measurably better."""
    ratios = log_ratios(turns, [], [("opd", PLAIN), ("opd", CHAMPION)], {})
    speeds = [comparison("speed", pair, found, **WHERE).to_json() for pair, found in ratios.items()]
    better = {"kind": "tau", "arm": "opd", "other": CHAMPION, "value": 0.4, "error": 0.01, "units": 40, "degrees": 39.0}
    gain = {"value": 0.2, "error": 0.005, "units": 40, "degrees": 39.0}
    return {
        **WHERE,
        "drafters": {CHAMPION: {"tau": 2.0}, "opd": {"tau": 2.4}},
        "comparisons": [*speeds, {**better, "set": None, "base": 2.0, "gain": gain}],
        "exactness": {"fp32_prompts": 4, "fp32_identical": 4},
        "verdicts": verdicts({}, {("opd", CHAMPION): ratios["opd", CHAMPION]}, turns[0]["prompts"]),
        "speed": speed_metrics(turns, [], {}),
        "speed_warnings": [each.to_json() for each in speed_warnings(turns, [], [Setting(**WHERE)])],
    }


def decide(found: dict[str, Any], config: GateConfig) -> GateDecision:
    return gate_stage.decide(EvaluationResult.model_validate(found), config)


def gate(turns: list[Turn], **config: Any) -> GateDecision:
    return decide(evaluation(turns), GateConfig(**config))


def changed(turns: list[Turn], **by_arm: Any) -> list[Turn]:
    """Return the runs with the wall time of an arm multiplied by a function of the round."""
    return [
        turn | {"wall_seconds": turn["wall_seconds"] * by_arm.get(turn["arm"], lambda _: 1.0)(turn["round"])}
        for turn in turns
    ]


def inconclusive(decision: GateDecision) -> list[str]:
    return [rule.name for rule in decision.rules if not rule.conclusive]


SPEEDS = ["speed-up", "speed at temperature 0, 1 in flight"]


def test_a_steady_machine_gives_no_warning_and_the_gate_decides() -> None:
    assert evaluation(measured())["speed_warnings"] == []
    assert gate(measured()).outcome == "promoted"
    slower = changed(measured(), opd=lambda _: 1.5)
    assert gate(slower).outcome == "refused"


def test_a_speed_up_above_the_served_tau_is_inconclusive() -> None:
    """Another program slowed decoding without a drafter in all its runs: no interval shows it."""
    turns = changed(measured(), plain=lambda _: 2.0)
    decision = gate(turns)
    assert decision.outcome == "inconclusive"
    assert "the speed-up of opd was measured as 3.7" in decision.sentence and "2.40" in decision.sentence
    assert inconclusive(decision) == SPEEDS
    assert gate(turns, judge_speed=False).outcome == "promoted", "tau does not hang on the machine"


def test_noise_makes_a_failing_rule_inconclusive() -> None:
    turns = changed(measured(), opd=lambda round: 1 + 0.5 * (round % 2))
    assert ("noise", ["opd"]) in [(each["kind"], each["arms"]) for each in evaluation(turns)["speed_warnings"]]
    assert gate(turns, min_speedup=1.6).outcome == "inconclusive"
    assert gate(changed(measured(), opd=lambda _: 1.5), min_speedup=1.6).outcome == "refused"
    faster = changed(turns, **{CHAMPION: lambda _: 2.0})
    assert gate(faster, min_speedup=0.8).outcome == "promoted", "what passes in spite of noise passes"
    together = changed(measured(), **{arm: lambda round: 1 + 0.5 * (round % 2) for arm in TAU})
    assert evaluation(together)["speed_warnings"] == [], "what happens to all arms of a round cancels"


def test_a_busy_machine_is_reported_and_its_ratios_hold() -> None:
    busy = [turn | {"others_share": 0.48} for turn in measured()]
    assert [each["kind"] for each in evaluation(busy)["speed_warnings"]] == ["load"]
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
    assert {each.kind for each in speed_warnings(turns, rows, [Setting(**WHERE)])} == expected
    errors = machine_errors(turns, rows)
    assert errors.keys() == {CHAMPION, "opd"}
    assert all(error == pytest.approx(noise * (2 / 24) ** 0.5, rel=0.5) for error in errors.values())


def test_a_warning_concerns_its_arms_and_its_setting() -> None:
    """A warning about another drafter, or another setting, changes nothing."""
    found = evaluation(measured())
    doubt = {"kind": "tau", "text": "it cannot be", "arms": ("opd",), **WHERE}
    for changed_to, expected in (
        ({}, SPEEDS),
        ({"arms": (CHAMPION,)}, SPEEDS[1:]),
        ({"arms": ()}, SPEEDS),
        ({"arms": ("control",)}, []),
        ({"concurrency": 8}, []),
        ({"temperature": 0.7}, []),
    ):
        assert inconclusive(decide(found | {"speed_warnings": [doubt | changed_to]}, GateConfig())) == expected, (
            changed_to
        )


def test_too_few_prompts_or_timed_runs_are_inconclusive() -> None:
    few = gate(measured(prompts=FEWEST_PROMPTS - 1))
    assert few.outcome == "inconclusive" and "3 prompts in a timed run are too few" in few.sentence
    short = gate(measured(rounds=4))
    assert short.outcome == "inconclusive" and "4 timed runs, 5 are needed" in short.sentence
    found = evaluation(measured())
    units = [each | ({"units": 3} if each["kind"] == "tau" else {}) for each in found["comparisons"]]
    decision = decide(found | {"comparisons": units}, GateConfig())
    assert (decision.outcome, inconclusive(decision)) == ("inconclusive", ["tau"])
    assert "3 prompts are too few" in decision.sentence


def test_timed_runs_with_too_few_prompts_for_their_concurrency_are_named() -> None:
    for in_flight, texts in (
        (4, []),
        (5, ["8 prompts in a timed run with 5 in flight are too few (10 are needed: raise evaluation.speed_prompts)"]),
        (16, ["8 prompts in a timed run are never 16 in flight (raise evaluation.speed_prompts)"]),
    ):
        turns = [turn | {"concurrency": in_flight} for turn in measured(prompts=8)]
        assert [each.text for each in speed_warnings(turns, [], [Setting(0.0, in_flight)])] == texts


def test_a_broken_rule_is_refused_even_beside_an_inconclusive_one() -> None:
    found = evaluation(changed(measured(), plain=lambda _: 2.0))
    lossy = found | {"exactness": {"fp32_prompts": 4, "fp32_identical": 3}}
    assert decide(lossy, GateConfig()).outcome == "refused"


def test_several_requests_at_a_time_are_bounded_by_the_best_of_them() -> None:
    """The longest answer decides when a run ends, and its tau may be above the mean."""
    turns = [turn | {"concurrency": 8} for turn in changed(measured(prompts=16), plain=lambda _: 1.6)]
    best = {**WHERE, "concurrency": 8, "arm": "opd", "tokens": 61, "verify_steps": 20}
    setting = [Setting(0.0, 8)]
    assert [each.kind for each in speed_warnings(turns, [], setting)] == ["tau", "tau"]
    assert [each.arms for each in speed_warnings(turns, [best], setting)] == [[CHAMPION]]


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_equal_repetitions_seldom_give_a_warning(noise: float) -> None:
    """How often these checks spoil a good measurement."""
    repetitions = 400
    wrong = sum(
        bool(speed_warnings(measured(noise=noise, seed=seed), [], [Setting(**WHERE)])) for seed in range(repetitions)
    )
    assert wrong / repetitions <= 0.03
