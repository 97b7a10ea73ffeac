"""Results of stages: what is read from a file is written as the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.base import ResultFile
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.drafting import AdoptedChampion, TraceSource
from draftsmith.artifacts.results.evaluation import Contexts, DiagnosisResult, DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision, GateVerdict, ReviewResult

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (EvaluationResult, "evaluation.json"),
        (EvaluationResult, "evaluation_served.json"),
        (Contexts, "contexts.json"),
        (GateDecision, "decision.json"),
        (GateVerdict, "verdict.json"),
        (DriftResult, "drift.json"),
        (PromptsSummary, "prompts.json"),
        (LogsSummary, "logs.json"),
        (TraceSource, "trace.json"),
        (AdoptedChampion, "champion.json"),
        (DiagnosisResult, "diagnosis.json"),
    ],
)
def test_a_result_is_written_as_the_bytes_that_were_read(kind: type[ResultFile], name: str, tmp_path: Path) -> None:
    (tmp_path / kind.FILE).write_bytes((GOLDEN / name).read_bytes())
    kind.read(tmp_path).write(tmp_path, "again.json")
    assert (tmp_path / "again.json").read_bytes() == (GOLDEN / name).read_bytes()


def test_keys_of_another_version_are_kept() -> None:
    content = {**json.loads((GOLDEN / "decision.json").read_text()), "confidence": 0.9}
    result = GateDecision.model_validate(content)
    assert result.to_json() == content


EARLIER = """{"promote": true, "outcome": "promoted", "challenger": "sft",
 "rules": [{"name": "tau", "passed": true, "said": "of an earlier release", "judged": true}]}"""


@pytest.mark.parametrize("content", [None, "{", "[]", '{"promote": "perhaps"}', EARLIER])
def test_a_damaged_file_is_an_error_that_names_it(content: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "gate" / "0123456789abcdef"
    folder.mkdir(parents=True)
    if content is not None:
        (folder / "decision.json").write_text(content)
    with pytest.raises(DraftsmithError, match=r"decision\.json: .* `--force gate`"):
        GateDecision.read(folder)


def test_the_challenger_is_the_best_arm_on_the_validation_split() -> None:
    arms = {name: {"tau": 3.0} for name in ("champion", "sft", "opd")}
    taus = {"champion": 9.0, "sft": 3.4, "opd": 3.2}
    assert EvaluationResult.model_validate({"drafters": arms, "validation_tau": taus}).challenger == "sft"
    assert EvaluationResult.model_validate({"drafters": arms}).challenger == "opd"


def test_a_review_is_read_with_all_its_keys(tmp_path: Path) -> None:
    (tmp_path / "review.json").write_bytes((GOLDEN / "review.json").read_bytes())
    review = ReviewResult.read(tmp_path)
    assert review.to_json() == json.loads((GOLDEN / "review.json").read_text())
    assert review.outcome is not None and review.metrics
    earlier = {"outcome": review.outcome.to_json(), "figures": dict(review.metrics)}
    (tmp_path / "review.json").write_text(json.dumps(earlier))
    with pytest.raises(DraftsmithError, match=r"review\.json: metrics: Field required\. Make it again: add `--force"):
        ReviewResult.read(tmp_path)
