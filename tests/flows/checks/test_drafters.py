"""`check` warns if compared answers are sampled differently, or if the gate can never promote."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.flows.checks.drafters import check_gate, check_sampling
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.refresh.graph import refresh_nodes
from tests.flows.processes import ROOT
from tests.testbed.refresh import load_config

SAMPLED = "sampling={max_new_tokens: 32, temperature: 0.7, top_p: 0.9}"


def warnings(nodes: list[Node]) -> list[str]:
    findings = Findings()
    check_sampling(findings, nodes)
    return findings.remarks


def refreshed(*overrides: str) -> list[str]:
    return warnings(refresh_nodes(load_config(ROOT / "configs" / "quickstart.yaml", list(overrides))))


@pytest.mark.parametrize("section", ["assisted", "evaluation", "heldout"])
def test_one_section_with_its_own_sampling_is_a_warning(section: str) -> None:
    (warning,) = refreshed(f"{section}.{SAMPLED}")
    assert warning.startswith("warning: evaluation: sampling differs") and "sampled at 0.7, top_p 0.9" in warning


def test_equal_sampling_gives_no_warning(tmp_path: Path) -> None:
    everywhere = [f"{section}.{SAMPLED}" for section in ("rollout", "assisted", "heldout", "evaluation")]
    assert refreshed() == refreshed(*everywhere) == []
    assert refreshed("evaluation.temperatures=[0, 1]") == [], "of several settings the first is the headline"
    assert refreshed("heldout.sampling={top_p: 0.5, top_k: 20}") == [], "top_p and top_k do not change greedy answers"
    with_top_k = [f"{section}.sampling.top_k=20" for section in ("heldout", "evaluation", "assisted")]
    (warning,) = refreshed(*everywhere, *with_top_k[:2])
    assert "sampled at 0.7, top_p 0.9, top_k 20 (heldout.sampling), assisted is sampled at 0.7, top_p 0.9" in warning
    assert refreshed(*everywhere, *with_top_k) == []
    (log := tmp_path / "log.jsonl").write_text("{}\n")
    (warning,) = refreshed(f"rollout.{SAMPLED}", "opd=null")
    assert "rollout is sampled at 0.7, top_p 0.9" in warning, "without OPD, SFT decides what was learnt"
    logs = f"logs={{paths: {log}, temperature: 0.7}}"
    assert len(refreshed(logs)) == 1
    assert refreshed(logs, "heldout.sampling.temperature=0.7", "evaluation.sampling.temperature=0.7") == []


@pytest.mark.parametrize(
    ("low", "overrides"),
    [
        ("evaluation.rounds 2", ["evaluation.rounds=2", "evaluation.concurrency=2"]),
        ("evaluation.speed_prompts 4", ["evaluation.rounds=1", "evaluation.speed_prompts=4"]),  # of its rounds
        ("held-out prompts, 31", ["evaluation.concurrency=16", "evaluation.speed_prompts=32", "prompts.heldout=31"]),
        ("prompts.validation is 4", ["prompts.validation=4", "gate.judge_speed=false"]),
        (None, ["prompts.validation=5"]),
        (None, ["prompts.validation=4", "gate.judge_speed=false", "opd=null"]),  # nothing is chosen
        (None, ["evaluation.rounds=2", "gate.judge_speed=false"]),
        (None, ["registry=null"]),
    ],
)
def test_a_gate_that_cannot_decide_is_a_warning(low: str | None, overrides: list[str]) -> None:
    findings = Findings()
    check_gate(findings, refresh_nodes(load_config(ROOT / "configs" / "quickstart.yaml", overrides)))
    assert len(findings.remarks) == (low is not None)
    assert low is None or low in findings.remarks[0]
