"""The pairs of drafters that are compared, and their verdicts."""

from __future__ import annotations

import math

import pytest

from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS, pairs, verdicts
from draftsmith.stages.runtime.statistics import Estimate


def test_every_drafter_is_compared_with_one_and_opd_with_sft_continued() -> None:
    assert pairs(["sft", "control", "opd", "other"]) == [
        ("control", "sft"), ("opd", "sft"), ("opd", "control"), ("other", "sft"),
    ]  # fmt: skip
    assert pairs(["opd", "control"]) == [("opd", "control")]
    assert pairs(["champion", "sft", "opd"]) == [("sft", "champion"), ("opd", "champion")]
    assert pairs(["sft", "opd", "native"]) == [("opd", "sft"), ("opd", "native"), ("native", "sft")]
    assert pairs(["mine", "theirs"]) == [("theirs", "mine")], "unknown ones are compared with the first"
    assert pairs(["sft"]) == pairs([]) == []


def test_a_verdict_of_tau_and_one_of_speed() -> None:
    tau = {("opd", "sft"): Estimate(0.3, 0.1, 40, 39.0)}
    speed = {("opd", "sft"): Estimate(math.log(1.1), 0.1, 5, 4.0)}
    of_tau, of_speed = verdicts(tau, speed, 6)
    assert (of_tau.kind, of_tau.arm, of_tau.other, of_tau.prompts) == ("tau", "opd", "sft", 40)
    assert of_tau.different is True and of_tau.level == pytest.approx(0.975)
    assert (of_tau.low, of_tau.high) == tau["opd", "sft"].interval(0.975)
    assert (of_speed.turns, of_speed.prompts, of_speed.turns_needed) == (5, 6, FEWEST_RUNS)
    assert of_speed.value == pytest.approx(1.1) and of_speed.different is False
    assert of_speed.low is not None and of_speed.high is not None
    assert of_speed.low * of_speed.high == pytest.approx(1.1**2)  # of a logarithm


def test_what_proves_no_difference() -> None:
    """Among many comparisons one that is barely significant, an interval without width, one prompt or timed run."""
    barely = Estimate(0.22, 0.1, 40, 39.0)
    assert verdicts({("opd", "sft"): barely}, {}, 0)[0].different is True
    assert {verdict.different for verdict in verdicts({(str(i), "sft"): barely for i in range(6)}, {}, 0)} == {False}
    assert verdicts({("opd", "sft"): Estimate(0.3, 0.0, 2, 1.0)}, {}, 0)[0].different is False
    alone = {("opd", "sft"): Estimate(0.3, math.nan, 1, 0.0)}
    for verdict in verdicts(alone, alone, 6):
        assert (verdict.different, verdict.low, verdict.high) == (None, None, None)
