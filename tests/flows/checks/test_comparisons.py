"""Compared answers are sampled alike, or `check` warns."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.flows.checks.comparisons import check_gate, check_sampling
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
def test_tau_sampled_otherwise_than_what_is_learned_or_timed_is_a_warning(section: str) -> None:
    (warning,) = refreshed(f"{section}.{SAMPLED}")
    assert warning.startswith("warning: evaluation: sampling differs") and "sampled at 0.7, top_p 0.9" in warning


def test_equal_sampling_is_no_warning(tmp_path: Path) -> None:
    everywhere = [f"{section}.{SAMPLED}" for section in ("rollout", "assisted", "heldout", "evaluation")]
    assert refreshed() == refreshed(*everywhere) == []
    assert refreshed("evaluation.temperatures=[0, 1]") == [], "of several settings the first is the headline"
    assert refreshed("heldout.sampling={top_p: 0.5, top_k: 20}") == [], "greedy answers have none"
    of_some = [f"{section}.sampling.top_k=20" for section in ("heldout", "evaluation", "assisted")]
    (warning,) = refreshed(*everywhere, *of_some[:2])
    assert "sampled at 0.7, top_p 0.9, top_k 20 (heldout.sampling), assisted is sampled at 0.7, top_p 0.9:" in warning
    assert refreshed(*everywhere, *of_some) == []
    assert refreshed(f"assisted.{SAMPLED}", "opd.verification=greedy") == [], "it is said how the drafter will serve"
    (log := tmp_path / "log.jsonl").write_text("{}\n")
    logs = f"logs={{paths: {log}, temperature: 0.7}}"
    assert len(refreshed(logs)) == 1
    assert refreshed(logs, "heldout.sampling.temperature=0.7", "evaluation.sampling.temperature=0.7") == []


@pytest.mark.parametrize(
    ("low", "overrides"),
    [
        ("evaluation.rounds 2", ["evaluation.rounds=2", "evaluation.concurrency=2"]),
        ("evaluation.speed_prompts 4", ["evaluation.rounds=1", "evaluation.speed_prompts=4"]),  # the repetitions
        ("held-out prompts, 31", ["evaluation.concurrency=16", "evaluation.speed_prompts=32", "prompts.heldout=31"]),
        (None, ["evaluation.rounds=2", "gate.judge_speed=false"]),
        (None, ["registry=null"]),
    ],
)
def test_a_gate_that_can_promote_nothing_is_told_before_anything_is_spent(
    low: str | None, overrides: list[str]
) -> None:
    findings = Findings()
    check_gate(findings, refresh_nodes(load_config(ROOT / "configs" / "quickstart.yaml", overrides)))
    assert len(findings.remarks) == (low is not None)
    assert low is None or low in findings.remarks[0]
