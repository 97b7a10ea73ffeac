"""`check` compares the processes of a training with the GPUs, the cores and the rendezvous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.stages.runtime.stage import RENDEZVOUS
from tests.testbed.refresh import node_of


def texts(findings: Findings) -> list[str]:
    return [f"{line.level.value} {line.text}" for line in findings.lines]


@pytest.mark.parametrize(
    ("fields", "gpus", "begins"),
    [
        ({"processes": 8}, 8, ["ok 8"]),
        ({"processes": 8}, 4, ["error 8 need a GPU each, and this machine has 4"]),
        ({"processes": 4}, 0, ["ok 4"]),
        ({"processes": 6}, 0, ["warning 6 are more than this machine's 4 cores"]),
        (
            {"processes": 3},
            3,
            [
                "warning 3: with 8 answers a step the processes are idle for 11.1% of the time. "
                "Set sequences_per_step to 6"
            ],
        ),
        ({"nodes": 2}, 0, ["ok 1 on each of 2 nodes that meet at head:29400"]),
        ({"nodes": 2}, None, [f"error parallel.nodes: {RENDEZVOUS} is not set"]),
        ({"processes": 1}, 0, []),
    ],
)
def test_processes_have_a_gpu_or_a_core_each_and_nodes_a_rendezvous(
    fields: dict[str, Any], gpus: int | None, begins: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpus: None without a rendezvous."""
    monkeypatch.setenv(RENDEZVOUS, "" if gpus is None else "head:29400")
    monkeypatch.setattr(engines, "visible_gpus", lambda: (80e9,) * (gpus or 0))
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 4)
    findings = Findings()
    engines.check_parallel(findings, [node_of("sft", parallel=fields)])
    assert [text[: len(begin)] for text, begin in zip(texts(findings), begins, strict=True)] == begins


def test_cores_are_not_compared_if_another_machine_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers need GPUs, of which this machine has none, so the trainings run elsewhere too."""
    monkeypatch.setattr(engines, "visible_gpus", lambda: ())
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 4)
    served = {"kind": "sglang", "python": "python", "launch": {"servers": 8}}
    findings = Findings()
    engines.check_parallel(findings, [node_of("rollout", engine=served), node_of("sft", parallel={"processes": 8})])
    assert texts(findings) == ["ok 8"]


@pytest.mark.parametrize(
    ("sharing", "begins"),
    [(1, []), (2, ["ok 2 processes share a copy"]), (4, ["error parallel.target_parallel: 4 does not divide the"])],
)
def test_a_shared_target_must_be_divisible(sharing: int, begins: list[str], plain_artifact: Path) -> None:
    findings, parallel = Findings(), {"processes": 4, "target_parallel": sharing}
    engines.check_shared_target(findings, [node_of("opd", parallel=parallel)], plain_artifact)
    assert [text[: len(begin)] for text, begin in zip(texts(findings), begins, strict=True)] == begins
