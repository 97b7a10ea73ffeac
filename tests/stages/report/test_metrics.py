"""The names under which MLflow finds metrics."""

from __future__ import annotations

import pytest

from draftsmith.artifacts.results.data import PromptsSummary
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.report.metrics import report_metrics
from draftsmith.stages.report.tables import stages
from tests.stages.report.sample_report import DECISION, EVALUATION, OF_A_LINE, entry


def test_answers_of_production_were_not_generated_by_the_refresh() -> None:
    lineage = [
        entry("assisted", 60.0, {}, "logs", response_tokens=98_000),
        entry("heldout", 6.0, {}, "rollout", response_tokens=300),
    ]
    assert [row[4] for row in stages(lineage).rows] == ["—", "300", "300"]
    assert report_metrics(EvaluationResult(), None, lineage)["cost.tokens"] == 300


def test_metrics_have_the_same_names_in_every_refresh() -> None:
    lineage = [entry("opd", 12.0, {"parallel": {"processes": 4}}, positions=100.0), entry("sft", 3.0, {})]
    evaluation, decision = EvaluationResult.model_validate(OF_A_LINE), GateDecision.model_validate(DECISION)
    prompts = PromptsSummary.model_validate({"counts": {"a": {"train": 400}}, "heldout_by": "prompt"})
    found = report_metrics(evaluation, decision, lineage, {"prompts": prompts, "logs": None})
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
    assert found["load.speedup.c1"] == pytest.approx(1.5)
    assert found["load.speedup.c1.low"] < found["load.speedup.c1"] < found["load.speedup.c1.high"]
    assert found["load.speed_over_champion.c16"] == pytest.approx(1.1 / 16**0.2)
    assert (found["load.tokens_per_s.c1"], found["load.block_size.c16"]) == (90.0, 4)
    assert (found["cost.wall_s"], found["cost.wall_s.opd"], found["cost.positions"]) == (15.0, 12.0, 100.0)
    assert found["cost.device_s"] == 4 * 12.0 + 3.0
    assert found["gate.tau"] == 1.0 and "gate.speed-up" not in found, "it is inconclusive"
    assert (found["rules_broken"], found["rules_unjudged"]) == (0.0, 1.0)
    assert [found[f"gate.tau.{name}"] for name in ("value", "end", "wanted")] == [0.073, 0.062, 0.0]
    assert found["gate.speed at temperature 0 16 in flight"] == 1.0, "a metric's name has no comma"
    assert found["accepted_length.challenger.0"] == 250
    assert found["accepted_share.challenger.2"] == pytest.approx(0.75**2)
    assert found["accepted_share.challenger/chat.2"] == 0.25 and "accepted_share.champion/chat.2" not in found
    assert found["parity.opd.replayed_tau"] == 3.32
    assert (found["speed_warnings"], found["data.prompts.counts.a.train"]) == (1.0, 400.0)
    of_another_kind = report_metrics(EvaluationResult.model_validate(EVALUATION))
    assert of_another_kind["tau.challenger"] == 3.543 and "tau.champion" not in of_another_kind
