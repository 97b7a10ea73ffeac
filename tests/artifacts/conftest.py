"""A database of MLflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.tracking.runs import Tracking


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables: making them takes seconds."""
    folder = tmp_path_factory.mktemp("migrated")
    Tracking(folder).check()
    return folder


@pytest.fixture
def tracking(migrated: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tracking:
    """An experiment of its own for every test, in the shared database."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return Tracking(migrated)
