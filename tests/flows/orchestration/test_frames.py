"""How many functions of ours are running when a stage's body begins, and how many a run without work calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flows.processes import run_python
from tests.flows.toy import write_config

pytestmark = pytest.mark.integration

MOST = 20  # in the flow's process until it starts the stage's, and from there to the body
# Runs a command and writes the stack where it starts a stage's process; argv has none: config and file are in the text.
_COMMAND = """
import json, subprocess, sys
from pathlib import Path
from draftsmith.flows.cli.main import main
from draftsmith.stages.runtime import child_process
from tests.flows.frames import frames_of_ours
from tests.flows.toy import TOY

class Noting(subprocess.Popen):
    def __init__(self, command, **options):
        if "draftsmith.stages" in command:
            Path({note!r}).write_text(json.dumps(frames_of_ours()))
        super().__init__(command, **options)

child_process.subprocess.Popen = Noting
assert main(["run", {config!r}, "--until", "target"], TOY) == 0
"""


def test_few_functions_lie_above_a_stages_body(tmp_path: Path) -> None:
    flow, stage = tmp_path / "flow.json", tmp_path / "stage.json"
    config = write_config(tmp_path / "toy.yaml", target={"note_frames": str(stage)})
    run_python(tmp_path / "home", _COMMAND.format(note=str(flow), config=str(config)))
    above = [*json.loads(flow.read_text()), *json.loads(stage.read_text())]
    assert above[0] == "main.main" and above[-1] == "stage.run"
    assert len(above) <= MOST, "\n".join(above)


UNCHANGED = 235  # functions of the runner: the toy's stages, checks and results are few
_PROFILED = """
import cProfile, inspect
from draftsmith.flows.cli.main import main
from tests.flows.frames import is_ours
from tests.flows.toy import TOY

with cProfile.Profile() as profile:
    assert main(["run", {config!r}], TOY) == 0
codes = [each.code for each in profile.getstats() if not isinstance(each.code, str) and is_ours(each.code.co_filename)]
functions = [code for code in codes if code.co_flags & inspect.CO_OPTIMIZED and not code.co_name.startswith("<")]
print(len(functions))
"""


def test_a_run_that_changes_nothing_calls_few_functions(tmp_path: Path) -> None:
    home, config = tmp_path / "home", write_config(tmp_path / "toy.yaml")
    run_python(home, _PROFILED.format(config=str(config)))
    again = run_python(home, _PROFILED.format(config=str(config)))
    assert "total: reused" in again
    assert int(again.splitlines()[-1]) <= UNCHANGED, again
