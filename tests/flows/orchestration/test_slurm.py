"""The Slurm template of a job on several nodes, with scripts that record the calls of Slurm and of the flow."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.flows.processes import ROOT, wait_until

SCRIPT = ROOT / "configs" / "scale" / "four-nodes.sbatch"
FLOW = """#!/bin/bash
trap 'echo saved > saved; exit 143' TERM
echo "$DRAFTSMITH_RENDEZVOUS $@" > flow.new && mv flow.new flow
for _ in $(seq 600); do [ -e done ] && exit "$(cat done)"; sleep 0.05; done
"""
JOINING = """#!/bin/bash
trap 'echo ended > ended; exit' TERM
echo "$@" > joining.new && mv joining.new joining
for _ in $(seq 600); do sleep 0.05; done
"""


def submitted(folder: Path, *, slow: str = "") -> subprocess.Popen[bytes]:
    """Start the job on the first of four nodes with 64 cores, whose host name is longer than its name in Slurm.

    slow: what its shell does before the flow.
    """
    commands = folder / ".venv" / "bin"
    commands.mkdir(parents=True)
    programs = {"draftsmith": FLOW, "srun": JOINING, "hostname": "#!/bin/sh\necho node1.of.the.cluster\n"}
    for name, text in programs.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    (commands / "activate").write_text(f'PATH="{commands}:$PATH"\n')
    slurm = {"SLURM_NNODES": "4", "SLURM_CPUS_PER_TASK": "64", "SLURMD_NODENAME": "node1"}
    script = folder / SCRIPT.name
    script.write_text(SCRIPT.read_text().replace("\ndraftsmith run", f"\n{slow}\ndraftsmith run"))
    return subprocess.Popen(["bash", str(script), "a.yaml"], cwd=folder, env={**os.environ, **slurm})


@pytest.mark.parametrize("asked_to_stop", [False, True])
def test_a_job_runs_the_flow_on_its_first_node_and_joins_it_on_the_others(asked_to_stop: bool, tmp_path: Path) -> None:
    """The job ends with the flow's exit code, and passes on the signal before its time limit."""
    job = submitted(tmp_path)
    try:
        wait_until(lambda: (tmp_path / "flow").exists() and (tmp_path / "joining").exists(), "both")
        assert (tmp_path / "flow").read_text() == "node1:29400 run a.yaml\n"
        joining = (tmp_path / "joining").read_text().split()
        assert joining[:4] == ["--nodes=3", "--ntasks=3", "--cpus-per-task=64", "--exclude=node1"]
        assert {"--nnodes=4", "--rdzv-endpoint=node1:29400", "draftsmith.stages.runtime.join"} <= set(joining)
        if asked_to_stop:
            job.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "done").write_text("3")
        assert job.wait(30) == (143 if asked_to_stop else 3)
        assert (tmp_path / "saved").exists() == asked_to_stop
        wait_until(lambda: (tmp_path / "ended").exists(), "the end of those that joined")
    finally:
        job.kill()


def test_a_job_that_is_stopped_early_does_not_start_its_flow(tmp_path: Path) -> None:
    job = submitted(tmp_path, slow="touch slow; sleep 1")
    try:
        wait_until(lambda: (tmp_path / "slow").exists() and (tmp_path / "joining").exists(), "the others")
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == 143 and not (tmp_path / "flow").exists()
    finally:
        job.kill()
