"""Lists the stages: name -> module that declares it as `STAGE`, in the order of the pipeline.

To add a stage, write its module and add a line here. A stage's own code must not import this module: the digest of a
stage's code follows every module named here.
"""

from __future__ import annotations

STAGES = {
    "target": "draftsmith.stages.targets.stage",
    "prompts": "draftsmith.stages.data.prompts.stage",
    "champion": "draftsmith.stages.drafters.champion",
    "drift": "draftsmith.stages.evaluation.drift",
    "earlier": "draftsmith.stages.data.logs.earlier",
    "logs": "draftsmith.stages.data.logs.stage",
    "rollout": "draftsmith.stages.engines.stage",
    "sft": "draftsmith.stages.training.sft.stage",
    "mining": "draftsmith.stages.replay.stage",
    "opd": "draftsmith.stages.training.opd.stage",
    "evaluation": "draftsmith.stages.evaluation.stage",
    "gate": "draftsmith.stages.evaluation.gate",
    "report": "draftsmith.stages.report.stage",
    "diagnosis": "draftsmith.stages.evaluation.diagnosis.stage",
}
