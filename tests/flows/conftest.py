"""Fixtures for the tests of the flows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftsmith.artifacts.tracking.runs import Tracking


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty home."""
    folder = tmp_path / "home"
    monkeypatch.setenv("DRAFTSMITH_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    """Undo what a command sets for Prefect, such as the folder of its database."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def usual_umask() -> Iterator[None]:
    """Let others read new files; the test must leave it so."""
    before = os.umask(0o022)
    yield
    assert os.umask(before) == 0o022


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """Return MLflow with its own database, which takes ten seconds to create."""
    return Tracking(tmp_path_factory.mktemp("mlflow"))
