"""Fixtures: an MLflow database, and an experiment in it for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.artifacts.tracking.runs import Tracking


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a migrated database, shared because creating the tables takes seconds."""
    folder = tmp_path_factory.mktemp("migrated")
    Tracking(folder).check()
    return folder


@pytest.fixture
def tracking(migrated: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tracking:
    """A connection with one experiment per test, in the shared database."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", request.node.name)
    return Tracking(migrated)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(Tracking(tmp_path_factory.mktemp("home")))
