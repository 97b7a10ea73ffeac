"""Stage `gate`: what it writes, logs and counts; `test_gate_rules.py` tests the rules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from draftsmith.artifacts.results.evaluation import CHAMPION, PLAIN
from draftsmith.artifacts.results.gate import GateDecision, GateVerdict
from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import Provenance
from draftsmith.stages.evaluation.gate import GateConfig, run
from draftsmith.stages.evaluation.verdicts import comparison
from draftsmith.stages.runtime.statistics import Estimate
from tests.testbed.context import RecordingContext

EXACT = {"fp32_prompts": 4, "fp32_identical": 4, "identical_share": 1.0}


@pytest.mark.parametrize(
    ("factor", "turns", "text", "broken", "inconclusive"),
    [
        (1.2, 6, "passed  speed-up: 1.200 times, at least 1.176 at 95 %; above 1.000 wanted", 0, 0),
        (0.9, 6, "failed  speed-up: 0.900 times, at least 0.882 at 95 %; above 1.000 wanted", 1, 0),
        (1.2, 1, "inconclusive  speed-up: 1.200 times, inconclusive", 0, 1),
    ],
)
def test_broken_and_inconclusive_rules_are_counted_apart(
    tmp_path: Path, factor: float, turns: int, text: str, broken: int, inconclusive: int
) -> None:
    speed = Estimate(math.log(factor), 0.01, turns, 5.0)
    found = {
        "drafters": {"opd": {"tau": 1.3}},
        "compared": [comparison("speed", ("opd", PLAIN), speed, temperature=0.0, concurrency=1).to_json()],
        "exactness": EXACT,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    ctx = RecordingContext.under(tmp_path, {"evaluation": tmp_path})
    run(ctx, GateConfig())
    promoted = not broken and not inconclusive
    assert any(line.startswith(text) for line in ctx.logs), ctx.logs
    assert ctx.summaries == {"promote": promoted, "rules_broken": broken, "rules_unjudged": inconclusive}
    for kind in (GateDecision, GateVerdict):
        assert kind.read(ctx.out).promote is promoted


@pytest.mark.parametrize("damaged", [None, "opd", CHAMPION])
def test_a_damaged_drafter_of_either_side_is_a_broken_rule(damaged: str | None, tmp_path: Path) -> None:
    store, inputs = Store(tmp_path / "store"), {"evaluation": tmp_path}
    for arm, key in (("opd", "a"), (CHAMPION, "b")):
        with store.claim("opd", key * 64) as claim:
            assert isinstance(claim, Claim)
            (claim.out / "model.safetensors").write_text(arm)
            inputs[arm] = store.commit(claim, Provenance({}, {}, "", 0)).path
    found = {"drafters": {"opd": {"tau": 1.3, "tau_low": 1.2}}, "exactness": EXACT}
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    if damaged is not None:
        (inputs[damaged] / "model.safetensors").write_text("x")
    ctx = RecordingContext.under(tmp_path / "gate", inputs)
    run(ctx, GateConfig(judge_speed=False))
    verdict = GateVerdict.read(ctx.out)
    assert verdict.champion and verdict.promote is (damaged is None)
    assert [name for name, passed in verdict.rules.items() if not passed] == ["checksums"] * (damaged is not None)
