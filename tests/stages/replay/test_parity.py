"""The parity gate on tables by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import to_table
from draftsmith.artifacts.tables.schemas import TRACE
from draftsmith.stages.replay import parity
from draftsmith.stages.replay.parity import ParityTolerance, check_tau

BF16 = ParityTolerance("mining", float32=False, greedy=True, allowed=0.25)
FP32 = ParityTolerance("evaluation", float32=True, greedy=True, allowed=0.25, subject="drafter opd: ")
SAMPLED = ParityTolerance("mining", float32=True, greedy=False, allowed=0.25)
OFF = ParityTolerance("mining", float32=True, greedy=True, allowed=1.0)


def step(anchor: int, accepted: int = 1, trajectory: str = "a", logprobs: list[float] | None = None) -> dict[str, Any]:
    return {
        "trajectory_id": trajectory, "step": 0, "anchor": anchor, "accepted": accepted, "proposed_ids": [5, 6, 7],
        "target_logprobs": logprobs,
    }  # fmt: skip


def steps(count: int, **changes: Any) -> list[dict[str, Any]]:
    return [step(2 * i, **changes) for i in range(count)]


def check_steps(gate: ParityTolerance, served: list[dict[str, Any]], replayed: list[dict[str, Any]]) -> dict[str, Any]:
    return parity.check_steps(gate, to_table(TRACE, served), to_table(TRACE, replayed))


def test_equal_steps_pass_and_trajectories_without_a_record_do_not_count() -> None:
    replayed = steps(10) + steps(5, trajectory="b")
    assert check_steps(FP32, steps(10), replayed) == {"served_steps": 10, "different_steps": 0, "mismatch_share": 0.0}


@pytest.mark.parametrize(
    "other",
    [
        step(18, accepted=2),
        step(19),
        {**step(18), "proposed_ids": [5, 8, 7]},
        {**step(18), "proposed_ids": [5, 6]},
        {**step(18), "proposed_ids": []},
    ],
    ids=["length", "anchor", "rejected proposal", "fewer proposals", "no proposals"],
)
def test_one_other_step_fails_in_float32_and_counts_once_in_bfloat16(other: dict[str, Any]) -> None:
    served = [*steps(9), other]
    with pytest.raises(DraftsmithError, match="evaluation: drafter opd: 1 of 10 verify steps served by the engine"):
        check_steps(FP32, served, steps(10))
    for gate in (BF16, SAMPLED, OFF):
        assert check_steps(gate, served, steps(10))["mismatch_share"] == 0.1


def test_proposals_after_the_first_rejected_one_count_in_float32_alone() -> None:
    served = [*steps(9), {**step(18), "proposed_ids": [5, 6, 8], "target_logprobs": [-1.0, -2.0, -9.0]}]
    replayed = [*steps(9), step(18, logprobs=[-1.0, -2.5, -3.0])]
    assert check_steps(SAMPLED, served, replayed)["mismatch_share"] == 0.1
    found = check_steps(BF16, served, replayed)
    assert (found["different_steps"], found["largest_logprob_difference"]) == (0, 0.5)


def test_steps_are_matched_by_trajectory_and_anchor_in_any_order() -> None:
    served = [step(i, trajectory=t, accepted=i) for i in range(3) for t in "ba"]
    replayed = [step(i, trajectory=t, accepted=i) for t in "cab" for i in range(3)]
    assert check_steps(FP32, served, replayed)["served_steps"] == 6
    served[2]["trajectory_id"], served[3]["trajectory_id"] = "a", "b"  # as good: both have such a step
    assert check_steps(FP32, served, replayed)["different_steps"] == 0
    served[0]["accepted"] = 1
    assert check_steps(BF16, served, replayed)["different_steps"] == 1


def test_an_engine_that_reports_no_proposals_is_compared_by_the_accepted_ones() -> None:
    served = [{**each, "proposed_ids": []} for each in steps(10)]
    assert check_steps(FP32, served, steps(10))["different_steps"] == 0
    served[3]["accepted"] = 2
    assert check_steps(BF16, served, steps(10))["different_steps"] == 1


def test_steps_that_were_not_recorded_count_as_different() -> None:
    assert check_steps(BF16, steps(8), steps(10))["different_steps"] == 2
    with pytest.raises(DraftsmithError, match=r"3 of 10 .* \(30.0%, mining.max_parity_mismatch allows 25.0%\)"):
        check_steps(BF16, steps(7), steps(10))


def test_the_largest_difference_of_log_probs_is_reported_and_bounded_in_float32() -> None:
    served = [step(0, logprobs=[-1.0, -2.0, -3.0]), step(2, accepted=0, logprobs=[-9.0, -9.0, -9.0])]
    replayed = [step(0, logprobs=[-1.0, -2.0005, float("nan")]), step(2, logprobs=[0.0, 0.0, 0.0])]
    found = check_steps(BF16, served[:1], replayed[:1])
    assert found["largest_logprob_difference"] == pytest.approx(5e-4, rel=1e-3)
    found = check_steps(OFF, served, replayed)  # log-probs of equal steps only
    assert found["largest_logprob_difference"] == pytest.approx(5e-4, rel=1e-3)
    check_steps(FP32, served[:1], replayed[:1])
    for wrong in (-2.1, float("nan")):
        served[0]["target_logprobs"][1] = wrong
        for gate in (FP32, SAMPLED):
            with pytest.raises(DraftsmithError, match="serves another target"):
                check_steps(gate, served[:1], replayed[:1])
        check_steps(BF16, served[:1], replayed[:1])


@pytest.mark.parametrize(
    ("served", "replayed", "apart"),
    [
        ([-1.0, -2.0], [-1.0, -2.5, -3.0], 0.5),  # what the engine did not tell is not compared
        ([-1.0, -2.0, -3.0], [-1.0, -2.5], 0.5),
        ([-1.0, -float("inf")], [-1.0, -float("inf")], 0.0),
        ([], [-1.0], None),
    ],
)
def test_log_probs_are_compared_where_both_sides_have_them(
    served: list[float], replayed: list[float], apart: float | None
) -> None:
    found = check_steps(BF16, [step(0, logprobs=served)], [step(0, logprobs=replayed)])
    assert found.get("largest_logprob_difference") == apart


def tau_of(gate: ParityTolerance, committed: list[int], served: list[int], replayed: list[int]) -> dict[str, Any]:
    return check_tau(gate, np.array(committed), np.array(served), np.array(replayed))


def answers(count: int, slower: float, noise: float = 0.05, tau: float = 6.0) -> tuple[list[int], ...]:
    """Return committed tokens, served and replayed steps; the engine's tau is `slower` times replay's."""
    rng = np.random.default_rng(0)
    replayed = rng.integers(15, 60, count)
    committed = (replayed * tau * rng.normal(1, 0.1, count)).round().astype(int)
    served = (replayed / slower * rng.normal(1, noise, count)).round().astype(int)
    return committed.tolist(), served.tolist(), replayed.tolist()


def test_counted_steps_are_compared_as_tau() -> None:
    assert tau_of(FP32, [60, 40], [20, 20], [20, 20]) == {
        "answers": 2, "served_tau": 2.5, "replayed_tau": 2.5, "tau_difference": 0.0, "tau_difference_high": None,
    }  # fmt: skip
    with pytest.raises(DraftsmithError, match=r"tau is 2.439 as served and 2.500 in replay .*float32 with greedy"):
        tau_of(FP32, [60, 40], [20, 21], [20, 20])
    with pytest.raises(DraftsmithError, match="float32 with greedy"):  # one more and one less is no equality
        tau_of(FP32, [60, 40], [19, 21], [20, 20])


@pytest.mark.parametrize("count", [8, 64])
def test_a_measurably_lower_served_tau_fails_even_within_the_limit(count: int) -> None:
    """4.84 instead of 6.0 is 19 % off, and 25 % of the steps may differ."""
    with pytest.raises(
        DraftsmithError, match=r"tau is [45]\.\d+ as served and 6\.\d+ .* lower by at least \d+\.\d% .*rotary"
    ):
        tau_of(BF16, *answers(count, 4.84 / 6.0))
    assert tau_of(OFF, *answers(count, 4.84 / 6.0))["tau_difference"] == pytest.approx(-0.19, abs=0.03)


def test_a_target_that_is_served_otherwise_may_lose_tau_and_change_steps() -> None:
    other = replace(FP32, same_target=False)
    assert tau_of(other, *answers(64, 4.84 / 6.0))["tau_difference"] == pytest.approx(-0.19, abs=0.03)
    served = [*steps(9, logprobs=[-1.0] * 3), step(100, 2)]
    found = check_steps(other, served, [*steps(9, logprobs=[-1.1] * 3), step(100, 1)])
    assert (found["different_steps"], found["largest_logprob_difference"]) == (1, pytest.approx(0.1))
    with pytest.raises(DraftsmithError, match=r"max_parity_mismatch allows 25\.0%"):
        tau_of(other, *answers(64, 0.6))
    with pytest.raises(DraftsmithError, match=r"max_parity_mismatch allows 25\.0%"):
        check_steps(other, steps(6, accepted=2), steps(6))


@pytest.mark.parametrize(("slower", "noise"), [(1.0, 0.15), (0.99, 0.05), (1.1, 0.05)])
def test_near_ties_pass_and_so_does_a_higher_tau(slower: float, noise: float) -> None:
    """The check is one-sided: a tau above replay's is no error."""
    found = tau_of(BF16, *answers(64, slower, noise))
    assert found["tau_difference_high"] > -parity.TAU_TOLERANCE
    assert found["tau_difference"] == pytest.approx(slower - 1, abs=0.05)


def test_a_good_engine_is_seldom_refused() -> None:
    """Few answers have near-ties in 18 % of the steps, half for the better and half for the worse."""
    rng, refused = np.random.default_rng(0), 0
    for _ in range(1000):
        replayed = rng.integers(10, 50, 8)
        served = replayed + rng.binomial(replayed, 0.09) - rng.binomial(replayed, 0.09)
        try:
            check_tau(BF16, 3 * replayed, served, replayed)
        except DraftsmithError:
            refused += 1
    assert refused <= 10


def test_few_answers_fail_only_on_a_large_difference() -> None:
    """Equal differences of two answers prove nothing; a difference over the limit fails."""
    few = tau_of(BF16, [100, 100], [48, 48], [40, 40])
    assert (few["tau_difference_high"], few["tau_difference"]) == (None, pytest.approx(-1 / 6))
    with pytest.raises(DraftsmithError, match=r"mining: tau is 1.667 .*rotary settings"):
        tau_of(BF16, [100], [60], [40])
    same = tau_of(BF16, [30] * 5, [11] * 5, [10] * 5)  # five near-ties, though all on one side
    assert same["tau_difference_high"] < -parity.TAU_TOLERANCE


@pytest.mark.parametrize("counted", [0, 50])
@pytest.mark.parametrize("count", [1, 2, 20])
def test_an_engine_that_accepts_nothing_fails_even_within_the_limit(counted: int, count: int) -> None:
    """Replay's tau is 1.25, so a served tau of 1 is 20 % off."""
    counts = [50] * count, [counted] * count, [40] * count
    with pytest.raises(DraftsmithError, match=r"tau is 1\.000 as served and 1\.250"):
        tau_of(BF16, *counts)
    assert tau_of(OFF, *counts)["served_tau"] == 1
    assert tau_of(BF16, [10], [10], [9])["served_tau"] == 1  # a single near-tie may do that
