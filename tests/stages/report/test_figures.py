"""The names under which MLflow finds figures."""

from __future__ import annotations

import pytest

from draftsmith.stages.report.metrics import figures
from draftsmith.stages.report.tables import stages
from tests.stages.report.sample_report import DECISION, EVALUATION, OF_A_LINE


def test_answers_of_production_were_not_generated_by_the_refresh() -> None:
    artifacts = [
        {"name": "mining.trajectories", "stage": "logs", "duration_s": 60.0, "metrics": {"response_tokens": 98_000}},
        {"name": "evaluation.trajectories", "stage": "rollout", "duration_s": 6.0, "metrics": {"response_tokens": 300}},
    ]
    shown = stages(artifacts)
    assert shown is not None and [row[4] for row in shown.rows] == ["—", "300", "300"]
    assert figures({}, {}, artifacts)["cost.tokens"] == 300


def test_figures_have_the_same_names_in_every_refresh() -> None:
    artifacts = [
        {"name": "opd", "duration_s": 12.0, "metrics": {"positions": 100.0}, "config": {"parallel": {"processes": 4}}},
        {"name": "sft", "duration_s": 3.0},
    ]
    found = figures(OF_A_LINE, DECISION, artifacts, {"prompts": {"train": 400, "file": "a"}})
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
