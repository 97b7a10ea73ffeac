"""Deployments without a server: options that are errors, parameters that fit the form, pool templates."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from prefect.workers.process import ProcessJobConfiguration

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.cli.main import main
from draftsmith.flows.orchestration.deployment import schedules_of
from tests.flows.processes import ROOT
from tests.flows.toy import TOY, write_config

POOLS = ROOT / "configs" / "team" / "pools"


def test_a_deployment_needs_a_permanent_server_and_existing_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    config = str(write_config(tmp_path / "toy.yaml"))
    assert main(["deploy", config, "--pool", "p"], TOY) == 2
    assert "PREFECT_API_URL is not set" in capsys.readouterr().err
    assert main(["deploy", config, "--pool", "p", "--force", "lfet"], TOY) == 2
    assert "--force lfet: no such node" in capsys.readouterr().err
    assert main(["deploy", config, "--pool", "p", "--watch", "report", "--force", "left"], TOY) == 2
    assert "a watch makes no node" in capsys.readouterr().err
    assert main(["deploy", config, "--pool", "p", "--from", "lfet"], TOY) == 2
    assert "--from lfet: no such node" in capsys.readouterr().err
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(("cron", "timezone"), [("at noon", "UTC"), ("0 3 * * 1", "Nowhere/Here")])
def test_an_invalid_schedule_is_an_error(cron: str, timezone: str) -> None:
    with pytest.raises(DraftsmithError, match="--cron "):
        schedules_of(cron, timezone)
    (good,) = schedules_of("0 3 * * 1", "Europe/Berlin")
    assert good.timezone == "Europe/Berlin"


@pytest.mark.parametrize("path", sorted(POOLS.glob("*.json")), ids=lambda path: path.stem)
def test_a_pool_template_uses_exactly_its_variables(path: Path) -> None:
    template = json.loads(path.read_text())
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])


def test_the_process_and_slurm_templates_are_settings_of_prefects_own_worker() -> None:
    def made(name: str) -> ProcessJobConfiguration:
        template = json.loads((POOLS / f"{name}.json").read_text())
        values: dict[str, Any] = {"env": {"A": "1"}, "working_dir": "/tmp"}
        configuration: ProcessJobConfiguration = asyncio.run(
            ProcessJobConfiguration.from_template_and_values(template, values, client=object())  # type: ignore[arg-type]
        )
        return configuration

    known = {"DRAFTSMITH_HOME": "/srv/draftsmith", "MLFLOW_TRACKING_URI": "http://mlflow.example:5000"}
    for name in ("process", "slurm"):
        assert made(name).env == {**known, "A": "1"}
        assert str(made(name).working_dir) == "/tmp"
    assert made("process").command is None
    command = made("slurm").command
    assert command is not None and command.startswith("srun ") and command.endswith(" -m prefect.engine")
