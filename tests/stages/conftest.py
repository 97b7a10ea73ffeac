"""A random target and a random drafter for it: small enough for plain loops, seeded, float32. Not to be changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.drafters.dflash.model import DFlashDrafter
from stages.targets.causal_lm import Target
from tests.testbed import random_target


@pytest.fixture(scope="session")
def plain_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the stage `target`."""
    return random_target.write_artifact(tmp_path_factory.mktemp("random-target"))


@pytest.fixture(scope="session")
def plain_target(plain_artifact: Path) -> Target:
    return Target.load(plain_artifact, device="cpu")


@pytest.fixture(scope="session")
def plain_drafter(plain_target: Target) -> DFlashDrafter:
    return random_target.random_drafter(plain_target)
