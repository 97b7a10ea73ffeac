"""`draftsmith status` ends with the verdict of the last refresh with a report."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.store.local import Store
from draftsmith.flows.cli.main import main
from tests.flows.processes import ROOT
from tests.flows.refresh.line_runs import gated
from tests.testbed.artifacts import committed


def config_file(tmp_path: Path) -> Path:
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    content["target"] = {**content["target"], "source": str(tmp_path)}
    path = tmp_path / "weekly.yaml"
    path.write_text(yaml.safe_dump({**content, "name": "weekly"}))
    return path


def reported(store: Store, key: str, outcome: str) -> None:
    """Make an evaluation, a gate's decision and the report that read both."""
    drafter = committed(store, "opd", {"drafter.json": key}, key)
    made = gated(store, drafter, outcome)
    inputs = {name: made[name] for name in ("evaluation", "gate")}
    committed(store, "report", {"report.html": "<p>"}, key, inputs=inputs, run="weekly", node="report")


def test_status_ends_with_the_last_verdict(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = config_file(tmp_path), Store(home / "store")
    assert main(["status", str(config)]) == 0
    assert "Last report" not in capsys.readouterr().out
    for key, outcome in (("a", "inconclusive"), ("b", "refused")):
        reported(store, key, outcome)
    committed(store, "gate", {"decision.json": "{}"}, "c")  # a refresh that failed after its gate
    assert main(["status", str(config)]) == 0
    verdict = capsys.readouterr().out.rpartition("Last report, ")[2]
    assert "refused" in verdict and "inconclusive" not in verdict
