"""A run that waits for an accelerator which another one holds at Prefect's server, and is cancelled meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.flows.pipeline.processes import ROOT
from tests.testbed.databases import give_databases

# The server ends with its process; to those who hold something at it, it is like one that stays.
PROGRAM = textwrap.dedent(
    """
    import os
    from pathlib import Path
    from draftsmith.flows.pipeline import prefect_server

    prefect_server.start_prefect_server(Path(os.environ["DRAFTSMITH_HOME"])).wait()
    prefect_server._temporary.clear()
    from draftsmith.flows.pipeline.accelerator import held

    said, checks = [], []

    class CalledOff(Exception):
        pass

    def check():
        checks.append(len(said))
        if len(checks) == 2:
            raise CalledOff

    with held(print):
        try:
            with held(said.append, check):
                print("held by two")
        except CalledOff:
            print("called off:", *said)
    with held(print, check):
        print("held by the next")
    """
)


@pytest.mark.integration
def test_a_wait_is_called_off_by_its_check(tmp_path: Path) -> None:
    home = tmp_path / "home"
    give_databases(home)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**environment, "DRAFTSMITH_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    called_off, held = ended.stdout.splitlines()
    assert called_off.startswith("called off: waits for accelerator.") and called_off.count("waits for") == 1
    assert held == "held by the next"
