"""The Kubernetes template of a job with several pods: its names agree, and each pod runs its part by its number."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.stages.runtime.stage import ParallelConfig
from tests.flows.processes import ROOT

SERVICE, JOB = yaml.safe_load_all((ROOT / "configs" / "scale" / "four-nodes-kubernetes.yml").read_text("utf-8"))
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {each["name"]: each["value"] for each in CONTAINER["env"]}


def test_the_rendezvous_is_the_first_pods_name_in_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": job} and POD["subdomain"] == service
    monkeypatch.setenv("DRAFTSMITH_RENDEZVOUS", ENVIRONMENT["DRAFTSMITH_RENDEZVOUS"])
    assert ParallelConfig(processes=8, nodes=4).endpoint() == (f"{job}-0.{service}", 29400)
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 4
    claimed = {each["name"] for each in POD["volumes"]}
    assert {each["name"] for each in CONTAINER["volumeMounts"]} == claimed


def pod(number: str, programs: Path, does: str, shell_begins: str = "") -> subprocess.Popen[str]:
    """Start what the pod of this number runs.

    does: what its program does after it has printed its name and arguments.
    """
    for name in ("draftsmith", "torchrun"):
        (programs / name).write_text(f'#!/bin/bash\necho {name} "$@"\n{does}\n')
        (programs / name).chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    shell, option, script = CONTAINER["command"]
    return subprocess.Popen(
        [shell, option, f"{shell_begins}\n{script}"],
        env={**os.environ, **ENVIRONMENT, "PATH": path, "CONFIG": "my.yaml", "JOB_COMPLETION_INDEX": number},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("code", "ended"), [(0, 0), (75, 75), (RefusedError.exit_code, 0)])
def test_the_first_pod_runs_the_flow_and_a_refusal_succeeds(code: int, ended: int, tmp_path: Path) -> None:
    with pod("0", tmp_path, f"exit {code}") as process:
        printed, _ = process.communicate(timeout=60)
    assert (printed, process.returncode) == ("draftsmith run my.yaml\n", ended)


def test_the_other_pods_repeat_torchrun(tmp_path: Path) -> None:
    with pod("3", tmp_path, "exit 1", "sleep() { command sleep 0.1; }") as process:
        assert process.stdout is not None
        first, second = (process.stdout.readline() for _ in range(2))
        process.terminate()
        process.communicate(timeout=60)
    assert first == second and "--nnodes=4 --nproc-per-node=8" in first
    assert first.endswith(
        f"--rdzv-endpoint={ENVIRONMENT['DRAFTSMITH_RENDEZVOUS']} --rdzv-conf=read_timeout=600 "
        "-m draftsmith.stages.runtime.join\n"
    )


def test_bad_input_fails_the_job_without_a_retry() -> None:
    (rule,) = JOB["spec"]["podFailurePolicy"]["rules"]
    failing = {"operator": "In", "values": [DraftsmithError.exit_code]}
    assert (rule["action"], rule["onExitCodes"]) == ("FailJob", failing)
    assert POD["restartPolicy"] == "Never", "Kubernetes requires it for a podFailurePolicy"


@pytest.mark.parametrize(("number", "pause_s"), [("0", 0.2), ("3", 0.0)])
def test_a_terminated_pod_lets_its_program_save(number: str, pause_s: float, tmp_path: Path) -> None:
    saves = "trap 'echo saved; exit 143' TERM\necho works\nwhile true; do sleep 0.05; done"
    with pod(number, tmp_path, saves, f"trap 'sleep {pause_s}' DEBUG") as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)][1] == "works\n"
        process.terminate()
        output, _ = process.communicate(timeout=60)
    assert (output, process.returncode) == ("saved\n", 143)
