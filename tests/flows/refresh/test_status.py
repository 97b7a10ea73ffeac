"""`draftsmith status` ends with the verdict of the last refresh that came to its report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Claim, Store
from draftsmith.flows.cli import main
from draftsmith.flows.pipeline.history import note_made
from tests.flows.pipeline.processes import ROOT
from tests.flows.refresh.made import committed


def config_file(tmp_path: Path) -> Path:
    content = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    content["target"] = {**content["target"], "source": str(tmp_path)}
    path = tmp_path / "weekly.yaml"
    path.write_text(yaml.safe_dump({**content, "name": "weekly"}))
    return path


def reported(store: Store, key: str, sentence: str) -> tuple[ArtifactRef, ArtifactRef]:
    """A gate's decision and the report that read it."""
    decision = {"outcome": "refused", "promote": False, "challenger": "opd", "champion": None, "rules": []}
    text = json.dumps({**decision, "sentence": sentence})
    gate = committed(store, "gate", key, lambda out: (out / "decision.json").write_text(text))
    with store.claim("report", key * 64) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "report.html").write_text("<p>")
        return gate, store.commit(claim, config={}, inputs={"gate": gate}, code_digest="", seed=0)


def test_status_ends_with_the_last_verdict(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, store = config_file(tmp_path), Store(home / "store")
    assert main(["status", str(config)]) == 0
    assert "Last report" not in capsys.readouterr().out
    for key, sentence in (("a", "week one"), ("b", "week two")):
        gate, report = reported(store, key, sentence)
        for node, ref in (("gate", gate), ("report", report)):
            note_made(home, "weekly", node, ref)
    later, _ = reported(store, "c", "a gate whose run failed before its report")
    note_made(home, "weekly", "gate", later)
    assert main(["status", str(config)]) == 0
    shown = capsys.readouterr().out
    assert "Last report, " in shown and "week two" in shown.rpartition("Last report, ")[2]
    assert "week one" not in shown and "a gate whose run failed" not in shown
