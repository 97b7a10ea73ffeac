"""Stage `gate`: the challenger against the champion, rule by rule, behind everything that was measured."""

from __future__ import annotations

import json
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.evaluation.gate_rules import CHAMPION, GateConfig, challenger_of, decide
from draftsmith.stages.runtime.stage import Stage, StageContext

DECISION = "decision.json"
VERDICT = "verdict.json"  # of it, what was decided: measured figures are no content


def run(ctx: StageContext, config: GateConfig) -> None:
    """Write `decision.json` and `verdict.json`. A challenger that is refused is no error of the stage."""
    evaluation = json.loads((ctx.inputs["evaluation"] / "evaluation.json").read_text("utf-8"))
    challenger = challenger_of(evaluation)
    problems = [
        problem
        for arm in (challenger, CHAMPION)
        if arm in ctx.inputs and (problem := _damage(ctx.inputs[arm])) is not None
    ]
    decision = decide(evaluation, config, problems)
    (ctx.out / DECISION).write_text(json.dumps(decision.as_json(), indent=2) + "\n")
    verdict = {"promote": decision.promote, "challenger": challenger, "champion": CHAMPION in ctx.inputs}
    verdict["rules"] = {rule.name: rule.passed for rule in decision.rules}
    (ctx.out / VERDICT).write_text(json.dumps(verdict, indent=2) + "\n")
    for rule in decision.rules:
        ctx.log(f"{'unjudged' if not rule.judged else 'passed' if rule.passed else 'BROKEN'}  {rule.name}: {rule.said}")
    ctx.log(decision.sentence())
    unjudged = sum(not rule.judged for rule in decision.rules)
    broken = sum(rule.judged and not rule.passed for rule in decision.rules)
    ctx.summary(promote=float(decision.promote), rules_broken=broken, rules_unjudged=unjudged)


def _damage(folder: Path) -> str | None:
    """The first file of an artifact that is not what its manifest says; None if all are."""
    from draftsmith.artifacts.store.local import Store
    from draftsmith.artifacts.store.manifest import read_manifest

    try:
        Store(folder.parents[1]).verify(read_manifest(folder).ref(folder))
    except DraftsmithError as error:
        return str(error)
    return None


STAGE = Stage(
    name="gate",
    config=GateConfig,
    inputs=("evaluation", "champion?", "sft", "opd", "control?"),
    body=__name__,
    volatile=("metrics.jsonl", DECISION),
    reads_volatile=("evaluation",),
)
