"""`check` compares the processes of a training with the GPUs, the cores and the rendezvous."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.runtime.stage import RENDEZVOUS
from draftsmith.stages.training.config import OpdConfig, SftConfig


def line(
    fields: dict[str, Any], gpus: int, monkeypatch: pytest.MonkeyPatch, name: str = "sft", **config: Any
) -> str | None:
    """Return the finding on a training's processes, with this number of GPUs."""
    monkeypatch.setattr(engines, "gpus", lambda: (80e9,) * gpus)
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 4)
    node = Node(name, "draftsmith.stages.training.sft.stage", SftConfig.model_validate({"parallel": fields, **config}))
    findings = Findings()
    engines.check_parallel(findings, [node])
    return f"{findings.lines[0].level.value} {findings.lines[0].text}" if findings.lines else None


@pytest.mark.parametrize(
    ("fields", "gpus", "begins"),
    [
        ({"processes": 8}, 8, "ok 8"),
        ({"processes": 8}, 4, "error 8 need a GPU each, and 4 are here"),
        ({"processes": 4}, 0, "ok 4"),
        ({"processes": 6}, 0, "warning 6 are more than this machine's 4 cores"),
        (
            {"processes": 3},
            3,
            "warning 3: with 8 answers a step the processes are idle for 11.1% of the time. "
            "Set sequences_per_step to 6",
        ),
        ({"nodes": 2}, 0, "ok 1 on each of 2 nodes that meet at head:29400"),
        ({"processes": 1}, 0, None),
    ],
)
def test_processes_have_a_gpu_or_a_core_each(
    fields: dict[str, Any], gpus: int, begins: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RENDEZVOUS, "head:29400")
    text = line(fields, gpus, monkeypatch)
    assert (text is None) == (begins is None) and (text or "").startswith(begins or "")


def test_cores_are_not_compared_if_another_machine_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The servers need GPUs, of which this machine has none, so the trainings run elsewhere too."""
    monkeypatch.setattr(engines, "gpus", lambda: ())
    monkeypatch.setattr(engines.os, "cpu_count", lambda: 4)
    served = {"engine": {"kind": "sglang", "python": "python", "launch": {"servers": 8}}}
    training = SftConfig.model_validate({"parallel": {"processes": 8}})
    nodes = [
        Node("rollout", "draftsmith.stages.engines.stage", RolloutConfig.model_validate(served)),
        Node("sft", "draftsmith.stages.training.sft.stage", training),
    ]
    findings = Findings()
    engines.check_parallel(findings, nodes)
    assert [(line.level.value, line.text) for line in findings.lines] == [("ok", "8")]


def test_nodes_without_a_rendezvous_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RENDEZVOUS, raising=False)
    text = line({"nodes": 2}, 0, monkeypatch)
    assert text is not None and text.startswith(f"error parallel.nodes: {RENDEZVOUS} is not set")


@pytest.mark.parametrize(
    ("sharing", "begins"),
    [(1, []), (2, ["ok 2 processes share a copy"]), (4, ["error parallel.target_parallel: 4 does not divide the"])],
)
def test_a_shared_target_must_be_divisible(sharing: int, begins: list[str], plain_artifact: Path) -> None:
    fields = {"processes": 4, "target_parallel": sharing}
    node = Node("opd", "draftsmith.stages.training.opd.stage", OpdConfig.model_validate({"parallel": fields}))
    findings = Findings()
    engines.check_shared_target(findings, [node], plain_artifact)
    lines = [f"{line.level.value} {line.text}" for line in findings.lines]
    assert [line[: len(begin)] for line, begin in zip(lines, begins, strict=True)] == begins
