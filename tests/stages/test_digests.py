"""The project code in each stage's digest: an edit there makes the stage's artifacts again."""

from __future__ import annotations

import pytest

from draftsmith.artifacts.store.code_digest import code_modules
from draftsmith.stages.catalog import STAGES

_STORED = {"artifacts", "artifacts.store", "artifacts.tables"}
_MODEL = {*_STORED, "data", "runtime", "targets"}
_DRAFTERS = {"drafters", *(f"drafters.{kind}" for kind in ("dflash", "dflash2", "dspark", "eagle3", "mtp"))}
_ENGINES = {"engines", "engines.servers", "engines.sglang", "engines.vllm"}
_RESULTS = "artifacts.results"
# stage -> the packages, under `stages` where not `artifacts`, of which modules are in its digest
PACKAGES = {
    "target": {"artifacts", "artifacts.store", "runtime", "targets"},
    "sources": {"artifacts", "data", "runtime"},
    "prompts": {*_MODEL, _RESULTS, "data.prompts"} - {"artifacts.store"},
    "champion": {*_MODEL, *_DRAFTERS, _RESULTS},
    "drift": {*_MODEL, *_DRAFTERS, _RESULTS, "evaluation", "replay"},
    "earlier": {*_MODEL, _RESULTS, "data.logs"},
    "logs": {*_MODEL, _RESULTS, "data.logs"},
    "rollout": {*_MODEL, *_DRAFTERS, *_ENGINES, _RESULTS, "data.logs", "replay"},
    "sft": {*_MODEL, *_DRAFTERS, "replay", "training", "training.sft"},
    "mining": {*_MODEL, *_DRAFTERS, _RESULTS, "replay"},
    "opd": {*_MODEL, *_DRAFTERS, "replay", "training", "training.opd"},
    "evaluation": {*_MODEL, *_DRAFTERS, *_ENGINES, _RESULTS, "evaluation", "replay"},
    "gate": {*_MODEL, _RESULTS, "engines", "drafters", "evaluation", "replay"},
    "report": {*_MODEL, _RESULTS, "engines", "drafters", "evaluation", "replay", "report"},
    "diagnosis": {*_MODEL, *_DRAFTERS, *_ENGINES, _RESULTS, "evaluation", "evaluation.diagnosis", "replay"},
}
# of a training, which chooses its micro-batch by its memory
_ESTIMATES = {"targets.estimate", "training.estimate"}


def _modules(stage: str) -> set[str]:
    """Return the modules in a stage's digest, those of the stages without `stages.`."""
    return {name.removeprefix("draftsmith.").removeprefix("stages.") for name in code_modules(STAGES[stage])}


@pytest.mark.parametrize("stage", STAGES)
def test_a_digest_covers_the_packages_that_its_stage_reads(stage: str) -> None:
    modules = _modules(stage)
    packages = {name.rpartition(".")[0] or name for name in modules}
    assert packages - {"stages"} == PACKAGES[stage], "a dependency has come or gone: is it meant?"


@pytest.mark.parametrize("stage", STAGES)
def test_only_a_training_has_memory_estimates_in_its_digest(stage: str) -> None:
    estimates = {name for name in _modules(stage) if name in _ESTIMATES or "estimate" in name}
    assert estimates == (_ESTIMATES if stage in ("sft", "opd") else set())


def test_an_edit_of_a_gate_rule_makes_no_evaluation_again() -> None:
    gate = {"evaluation.gate", "artifacts.results.gate"}
    assert gate <= _modules("gate")
    assert not gate & (_modules("evaluation") | _modules("drift") | _modules("report") - {"artifacts.results.gate"})
