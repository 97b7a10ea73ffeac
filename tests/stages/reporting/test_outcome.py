"""The verdict in one sentence, for every outcome, and the names under which figures are found."""

from __future__ import annotations

from typing import Any

import pytest

from draftsmith.stages.reporting.figures import figures
from draftsmith.stages.reporting.outcome import duration, outcome, tiles
from draftsmith.stages.reporting.tables import cost
from tests.stages.reporting.sample_report import DECISION, EVALUATION, OF_A_LINE


def decided(outcome: str, *rules: tuple[str, bool], champion: str | None = "3") -> dict[str, Any]:
    told = [{"name": name, "passed": passed, "judged": True, "said": "figures"} for name, passed in rules]
    return DECISION | {"outcome": outcome, "promote": outcome == "promoted", "rules": told, "champion": champion}


@pytest.mark.parametrize(
    ("decision", "label", "sentence"),
    [
        (
            decided("promoted", ("tau", True)),
            "The gate says: promote",
            "SFT + OPD is to take the place of version 3 (tau 3.54 against 3.30).",
        ),
        (
            decided("promoted", ("speed-up", True), champion=None),
            "The gate says: promote",
            "SFT + OPD is to be the line's first champion.",
        ),
        (
            decided("refused", ("tau", False), ("tau of code", False)),
            "Not promoted",
            "Version 3 stays: SFT + OPD has no measurably higher tau and is measurably worse on code (tau 3.54 against "
            "3.30).",
        ),
        (
            decided("refused", ("lossless", False), champion=None),
            "Not promoted",
            "SFT + OPD changes what the target says.",
        ),
        (
            decided("refused", ("lossless", False), champion="champion"),
            "Not promoted",
            "The champion stays: SFT + OPD changes what the target says (tau 3.54 against 3.30).",
        ),
        (
            {},
            "Measured, nothing to decide",
            "SFT + OPD has a measurably higher tau than SFT: 3.54 against 3.41.",
        ),
    ],
)
def test_an_outcome_is_one_sentence(decision: dict[str, Any], label: str, sentence: str) -> None:
    found = outcome(OF_A_LINE, decision)
    assert found is not None
    assert (found.label, found.sentence) == (label, sentence)


def test_a_threshold_beyond_better_is_not_called_worse() -> None:
    for rule, wanted, said in (("tau", 0.15, "gain in tau"), ("speed-up", 1.5, "speed-up")):
        decision = decided("refused", (rule, False), champion=None)
        decision["rules"][0]["figures"] = {"value": 1.35, "wanted": wanted}
        found = outcome(OF_A_LINE, decision)
        assert found is not None and found.sentence == f"SFT + OPD has not measurably the {said} that is asked for."


def test_one_prompt_is_said_to_judge_nothing() -> None:
    verdicts = [{**OF_A_LINE["verdicts"][0], "different": None, "prompts": 1}]
    found = outcome({**OF_A_LINE, "verdicts": verdicts}, {})
    assert found is not None and "cannot be judged against SFT by 1 held-out prompt" in found.sentence


def test_nothing_that_was_measured_has_no_verdict() -> None:
    assert outcome({}, {}) is None
    assert tiles({}, 3.0) == []


def test_doubted_speeds_say_so_where_they_are_read_first() -> None:
    assert [tile.beside for tile in tiles(OF_A_LINE, 0) if tile.label.startswith("speed")] == ["not to be relied on"]
    calm = OF_A_LINE | {"doubts": []}
    assert [tile.beside for tile in tiles(calm, 0) if tile.label.startswith("speed")] == ["95 %: 1.46 to 1.55"]


def test_answers_of_production_were_not_generated_by_the_refresh() -> None:
    artifacts = [
        {"name": "mining.trajectories", "stage": "logs", "duration_s": 60.0, "metrics": {"response_tokens": 98_000}},
        {"name": "evaluation.trajectories", "stage": "rollout", "duration_s": 6.0, "metrics": {"response_tokens": 300}},
    ]
    shown = cost(artifacts)
    assert shown is not None and [row[4] for row in shown.rows] == ["—", "300", "300"]
    assert figures({}, {}, artifacts)["cost.tokens"] == 300


def test_figures_have_the_same_names_in_every_refresh() -> None:
    artifacts = [
        {"name": "opd", "duration_s": 12.0, "metrics": {"positions": 100.0}, "config": {"parallel": {"processes": 4}}},
        {"name": "sft", "duration_s": 3.0},
    ]
    found = figures(OF_A_LINE, DECISION, artifacts, {"prompts.train": 400})
    assert found["tau.champion"] == 3.3
    assert found["tau.challenger"] == found["tau.opd"] == 3.543
    assert found["tau.challenger/chat"] == pytest.approx(3.14)
    assert found["tau_gain"] == pytest.approx(0.24 / 3.3)
    assert found["tau_gain/chat"] == pytest.approx(0.2 / 3.3)
    assert found["tau_gain/chat.low"] < found["tau_gain/chat"] < found["tau_gain/chat.high"]
    assert found["tau.challenger/chat.low"] == pytest.approx(2.94)
    assert found["speedup.challenger/chat"] == found["speedup.opd/chat"] == 1.4
    assert found["speedup.challenger/chat.high"] == 1.5
    assert found["speedup.c1.t0"] == found["speedup.opd.c1.t0"] == pytest.approx(91.7 / 61.3)
    assert found["tokens_per_s.c16.t0"] == pytest.approx(91.7 * 16)
    assert found["tokens_per_s.plain.c16.t0"] == pytest.approx(61.3 * 16)
    assert found["speed_over_champion.c1.t0"] == pytest.approx(1.03)
    assert (found["cost.wall_s"], found["cost.wall_s.opd"], found["cost.positions"]) == (15.0, 12.0, 100.0)
    assert found["cost.device_s"] == 4 * 12.0 + 3.0
    assert found["gate.tau"] == 1.0 and "gate.speed-up" not in found, "it could not be judged"
    assert (found["rules_broken"], found["rules_unjudged"]) == (0.0, 1.0)
    assert [found[f"gate.tau.{name}"] for name in ("value", "end", "wanted")] == [0.073, 0.062, 0.0]
    assert found["gate.speed at temperature 0 16 in flight"] == 1.0, "a metric's name has no comma"
    assert found["accepted_length.challenger.0"] == 250
    assert found["accepted_share.challenger.2"] == pytest.approx(0.75**2)
    assert found["parity.opd.replayed_tau"] == 3.32
    assert (found["doubts"], found["data.prompts.train"]) == (1.0, 400.0)
    of_another_kind = figures(EVALUATION)
    assert of_another_kind["tau.challenger"] == 3.543 and "tau.champion" not in of_another_kind


def test_durations_are_said_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (12.4, 600, 7200)] == ["12 s", "10 min", "2.0 h"]
