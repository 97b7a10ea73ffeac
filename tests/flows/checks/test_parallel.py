"""Before anything is spent: a GPU for every process, cores, and where nodes meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks import engines as parallel
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.runtime.stage import RENDEZVOUS
from draftsmith.stages.training.config import OpdConfig, SftConfig


def line(
    fields: dict[str, Any], gpus: int, monkeypatch: pytest.MonkeyPatch, name: str = "sft", **config: Any
) -> str | None:
    """What is said of a training, with so many GPUs here."""
    monkeypatch.setattr(parallel, "gpus", lambda: (80e9,) * gpus)
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 4)
    node = Node(name, "draftsmith.stages.training.sft.stage", SftConfig.model_validate({"parallel": fields, **config}))
    findings = Findings()
    parallel.check_parallel(findings, [node])
    return f"{findings.lines[0].level.value} {findings.lines[0].text}" if findings.lines else None


@pytest.mark.parametrize(
    ("fields", "gpus", "said"),
    [
        ({"processes": 8}, 8, "ok 8"),
        ({"processes": 8}, 4, "error 8 need a GPU each, 4 are here. Lower parallel.processes."),
        ({"processes": 4}, 0, "ok 4"),
        ({"processes": 6}, 0, "warning 6, more than this machine has cores (4): that only makes it slower"),
        ({"nodes": 2}, 0, "ok 1 on each of 2 nodes that meet at head:29400"),
        ({"processes": 1}, 0, None),
    ],
)
def test_processes_are_checked(
    fields: dict[str, Any], gpus: int, said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RENDEZVOUS, "head:29400")
    assert line(fields, gpus, monkeypatch) == said


def test_cores_of_another_machine_than_the_one_that_runs_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A config of a node of GPUs, checked where there are none: its servers are for GPUs, and so are its trainings."""
    for module in (parallel, engines):
        monkeypatch.setattr(module, "gpus", lambda: ())
    monkeypatch.setattr(parallel.os, "cpu_count", lambda: 4)
    served = {"engine": {"kind": "sglang", "python": "python", "launch": {"servers": 8}}}
    training = SftConfig.model_validate({"parallel": {"processes": 8}})
    nodes = [
        Node("rollout", "draftsmith.stages.engines.stage", RolloutConfig.model_validate(served)),
        Node("sft", "draftsmith.stages.training.sft.stage", training),
    ]
    findings = Findings()
    parallel.check_parallel(findings, nodes)
    assert [(line.level.value, line.text) for line in findings.lines] == [("ok", "8")]


def test_nodes_without_a_rendezvous_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    said = line({"nodes": 2}, 0, monkeypatch)
    assert said is not None and said.startswith(f"error parallel.nodes: {RENDEZVOUS} is not set")


@pytest.mark.parametrize(
    ("sharing", "said"),
    [(1, []), (2, ["ok 2 processes share a copy"]), (4, ["error parallel.target_parallel: 4 does not divide the"])],
)
def test_a_target_that_processes_share_is_checked(sharing: int, said: list[str], plain_artifact: Path) -> None:
    fields = {"processes": 4, "target_parallel": sharing}
    node = Node("opd", "draftsmith.stages.training.opd.stage", OpdConfig.model_validate({"parallel": fields}))
    findings = Findings()
    parallel.check_shared_target(findings, [node], plain_artifact)
    lines = [f"{line.level.value} {line.text}" for line in findings.lines]
    assert len(lines) == len(said) and all(line.startswith(begin) for line, begin in zip(lines, said, strict=True))
