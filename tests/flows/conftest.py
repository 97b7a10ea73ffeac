"""What tests of the flows have in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.tracking.runs import Tracking


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, with no MLflow server beside it."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """MLflow with a database of its own, which takes ten seconds to make."""
    return Tracking(tmp_path_factory.mktemp("mlflow"))
