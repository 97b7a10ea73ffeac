"""The template of a job of several pods: its names fit each other, and what a pod does follows from its number."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftsmith.stages.parallel.config import ParallelConfig
from tests.flows.pipeline.processes import ROOT

SERVICE, JOB = yaml.safe_load_all((ROOT / "configs" / "scale" / "four-nodes-kubernetes.yml").read_text("utf-8"))
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
ENVIRONMENT = {each["name"]: each["value"] for each in CONTAINER["env"]}


def test_the_rendezvous_is_the_first_pod_by_the_name_that_the_service_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == {"job-name": job} and POD["subdomain"] == service
    monkeypatch.setenv("DRAFTSMITH_RENDEZVOUS", ENVIRONMENT["DRAFTSMITH_RENDEZVOUS"])
    assert ParallelConfig(processes=8, nodes=4).endpoint() == (f"{job}-0.{service}", 29400)
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"] == 4
    claimed = {each["name"] for each in POD["volumes"]}
    assert {each["name"] for each in CONTAINER["volumeMounts"]} == claimed


@pytest.mark.parametrize(
    ("number", "does"), [("0", "draftsmith run my.yaml"), ("3", "python -m draftsmith.stages.join")]
)
def test_the_first_pod_runs_the_flow_and_the_others_join_it(number: str, does: str, tmp_path: Path) -> None:
    for name in ("draftsmith", "python"):
        (tmp_path / name).write_text(f'#!/bin/bash\necho {name} "$@"\nexit 7\n')
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        CONTAINER["command"],
        env={**os.environ, **ENVIRONMENT, "PATH": path, "CONFIG": "my.yaml", "JOB_COMPLETION_INDEX": number},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == (f"{does}\n", 7)
