"""Fixtures of the engines' tests: requirements on servers, and short time limits for lost ones."""

from __future__ import annotations

import pytest

from draftsmith.artifacts import retry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.engines.servers import pool
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from tests.stages.engines.servers import requirements_of
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_S", 0.02)
    monkeypatch.setattr(pool, "_FULL_PAUSE_S", 0.02)
    monkeypatch.setattr(pool, "_FAILING_LIMIT_S", 0.3)
    monkeypatch.setattr(pool, "_STALLED_LIMIT_S", 0.3)


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> ServerRequirements:
    """Servers that answer without a drafter."""
    return requirements_of(tiny_drafter, None)


@pytest.fixture
def assisted(tiny_drafter: DrafterArtifacts) -> ServerRequirements:
    """Servers that draft with the tiny target's drafter."""
    return requirements_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)
