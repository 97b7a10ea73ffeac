"""Stage `gate`: what it writes, logs and counts; the rules themselves are held by `test_gate.py`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from draftsmith.artifacts.store.local import Claim, Store
from draftsmith.artifacts.store.manifest import Provenance
from draftsmith.stages.evaluation.gate import DECISION, VERDICT, run
from draftsmith.stages.evaluation.gate_rules import CHAMPION, PLAIN, GateConfig, compared
from draftsmith.stages.runtime.statistics import Estimate
from tests.testbed.context import RecordingContext

EXACT = {"fp32_prompts": 4, "fp32_identical": 4, "identical_share": 1.0}


@pytest.mark.parametrize(
    ("factor", "turns", "said", "broken", "unjudged"),
    [
        (1.2, 6, "passed  speed-up: 1.200 times, at least 1.176 at 95 %; above 1.000 wanted", 0, 0),
        (0.9, 6, "BROKEN  speed-up: 0.900 times, at least 0.882 at 95 %; above 1.000 wanted", 1, 0),
        (1.2, 1, "unjudged  speed-up: 1.200 times, not judged", 0, 1),
    ],
)
def test_broken_rules_and_those_that_nothing_is_known_of_are_counted_apart(
    tmp_path: Path, factor: float, turns: int, said: str, broken: int, unjudged: int
) -> None:
    speed = Estimate(math.log(factor), 0.01, turns, 5.0)
    found = {
        "drafters": {"opd": {"tau": 1.3}},
        "compared": [compared("speed", "opd", PLAIN, speed, temperature=0.0, concurrency=1)],
        "exactness": EXACT,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    ctx = RecordingContext.under(tmp_path, {"evaluation": tmp_path})
    run(ctx, GateConfig())
    promoted = not broken and not unjudged
    assert any(line.startswith(said) for line in ctx.logs), ctx.logs
    assert ctx.summaries == {"promote": promoted, "rules_broken": broken, "rules_unjudged": unjudged}
    for file in (DECISION, VERDICT):
        assert json.loads((ctx.out / file).read_text())["promote"] is promoted


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
    verdict = json.loads((ctx.out / VERDICT).read_text())
    assert verdict["champion"] and verdict["promote"] is (damaged is None)
    assert [name for name, passed in verdict["rules"].items() if not passed] == ["checksums"] * (damaged is not None)
