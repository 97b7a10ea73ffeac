"""Targets of random weights with a native head, one of each family."""

from __future__ import annotations

import pytest

from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.mtp import MODELS, target_with_head


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Return a target of each family, with its head."""
    return {family: target_with_head(tmp_path_factory.mktemp(family), family) for family in MODELS}
