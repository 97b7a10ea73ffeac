"""Secrets of the environment appear in nothing that a refresh stores or prints, with the real command and servers."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.flows.processes import run_toy
from tests.flows.toy import write_config

MARKER = "Zk9xMarker7Qw"
VARIABLES = {
    "PLACE": f"http://anna:{MARKER}1@127.0.0.1:9/x?token={MARKER}2&a=1 by {MARKER}3",  # an innocent name
    "MY_SERVICE_TOKEN": f"{MARKER}3",
    "HF_TOKEN": f"hf_{MARKER}4",
    "MLFLOW_TRACKING_PASSWORD": f"{MARKER}5",
}


@pytest.mark.integration
def test_a_refresh_leaves_no_secret_behind(tmp_path: Path) -> None:
    home = tmp_path / "home"
    config = write_config(tmp_path / "toy.yaml", target={"leaks": "PLACE"})
    done = run_toy(home, "run", config, **VARIABLES)
    assert done.returncode == 0, done.stderr
    files = [path for path in home.rglob("*") if path.is_file()]
    holding = [str(path.relative_to(home)) for path in files if MARKER.encode() in path.read_bytes()]
    assert holding == []
    assert MARKER not in done.stdout + done.stderr
    names = {path.relative_to(home).parts[0] for path in files}
    assert {"store", "logs", "mlflow.db", "prefect"} <= names
    logs = "".join(path.read_text() for path in home.glob("logs/collect-*.log"))
    assert "GET " in logs and "went away" in logs and "***" in logs  # logged, and redacted
    with sqlite3.connect(home / "prefect" / "prefect.db") as database:  # reads what is still in its write-ahead log too
        assert any("***" in message for (message,) in database.execute("select message from log"))
