"""Fixtures for the tests of the flows."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.tracking.runs import Tracking


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home, and set no MLflow server."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return folder


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """Return MLflow with its own database, which takes ten seconds to create."""
    return Tracking(tmp_path_factory.mktemp("mlflow"))
