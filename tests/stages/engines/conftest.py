"""What the tests of the engines share: servers that a test expects, and little patience with lost ones."""

from __future__ import annotations

import pytest

from draftsmith.artifacts import retry
from draftsmith.stages.data.load import DRAFTER_FOLDER
from draftsmith.stages.engines.sglang import pool
from draftsmith.stages.engines.sglang.handshake import Expected
from tests.stages.engines.servers import expected_of
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_S", 0.02)
    monkeypatch.setattr(pool, "_REST_S", 0.02)
    monkeypatch.setattr(pool, "_PATIENCE_S", 0.3)
    monkeypatch.setattr(pool, "_SILENT_S", 0.3)


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> Expected:
    """Servers that answer without a drafter."""
    return expected_of(tiny_drafter, None)


@pytest.fixture
def assisted(tiny_drafter: DrafterArtifacts) -> Expected:
    """Servers that draft with the tiny target's drafter."""
    return expected_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)
