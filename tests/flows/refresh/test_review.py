"""MLflow describes a run by its verdict, and says that it promoted only if it did."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import RefusedError
from draftsmith.artifacts.results.data import day
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.refresh_runs import ALL
from draftsmith.artifacts.tracking.runs import NOTE
from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.graph import ALL_NODES
from draftsmith.flows.planning.plan import Conclusion
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.screen import compared
from draftsmith.stages.report.review import name_of, outcome_of
from tests.flows.refresh.line_runs import config_of
from tests.stages.report.sample_report import OF_A_LINE
from tests.testbed.artifacts import committed

DECISION = {"outcome": "promoted", "promote": True, "challenger": "opd", "champion": "3", "rules": []}
EVALUATION = {"drafters": {"opd": {"tau": 3.5}, "champion": {"tau": 3.0}}}
OVERRULED = Conclusion(
    "Refused", "version 4 is not promoted: somebody took it out", RefusedError("no"), overrules_review=True
)


@pytest.mark.parametrize(
    ("conclusion", "begins"),
    [
        (
            Conclusion("Promoted", "it is"),
            ["**Promoted.** SFT + OPD takes the place of version 3 (acceptance length 3.50"],
        ),
        (OVERRULED, ["**Refused.** version 4 is not promoted: somebody took it out"]),
        (
            None,
            ["**No action yet.**", "**The gate says: promote.** SFT + OPD is to take the place"],
        ),
    ],
    ids=["followed", "overruled", "only looked"],
)
def test_the_description_of_a_run_states_its_conclusion(
    conclusion: Conclusion | None, begins: list[str], home: Path
) -> None:
    verdict = outcome_of(EvaluationResult.model_validate(EVALUATION), GateDecision.model_validate(DECISION))
    content = {"outcome": verdict.to_json(), "speed_warnings": [], "metrics": {}}
    store = Store(home / "store")
    report = committed(store, "report", {"review.json": json.dumps(content)})
    run = Run(REFRESH, config_of("a-line"), ALL_NODES)
    run.made, run.conclusion = {"report": report}, conclusion
    _, tags = run._metrics_and_tags()
    bold = [line for line in tags[NOTE].splitlines() if line.startswith("**")]
    assert len(bold) == len(begins) and all(map(str.startswith, bold, begins)), tags[NOTE]


def test_compared_drafters_have_metrics_by_prompt_set(home: Path) -> None:
    store = Store(home / "store")
    evaluated = committed(store, "evaluation", {"evaluation.json": json.dumps(OF_A_LINE)})
    arms = dict(zip(OF_A_LINE["drafters"], "abcd", strict=False))
    made = {arm: committed(store, "opd", {"drafter.json": "{}"}, key) for arm, key in arms.items()}
    drafters = compared({"evaluation": evaluated.path, **{arm: ref.path for arm, ref in made.items()}})
    when = day(datetime.now(UTC))
    assert list(drafters) == [f"{name_of(arm)}, {when}" for arm in arms]
    for arm, (manifest, metrics) in zip(arms, drafters.values(), strict=True):
        assert manifest.key == made[arm].key
        assert metrics[ALL]["tau"] == OF_A_LINE["drafters"][arm]["tau"]
        assert metrics[ALL]["speedup"] == OF_A_LINE["speed"][arm]["speedup"]
        by_set = {name: arms[arm]["tau"] for name, arms in OF_A_LINE["sets"].items() if arm in arms}
        assert {name: each["tau"] for name, each in metrics.items() if name != ALL} == by_set
