"""The batch that the losses are tested on."""

from __future__ import annotations

import pytest

from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.training.case import Case, make_case
from tests.testbed import random_target


@pytest.fixture(scope="session")
def case(plain_target: Target, plain_drafter: DFlashDrafter) -> Case:
    """Return three trajectories with anchors up to their ends, and steps that fit them."""
    return make_case(plain_target, plain_drafter.target_layer_ids)


@pytest.fixture
def drafter(plain_target: Target) -> DFlashDrafter:
    """Return a drafter whose gradients the test may take."""
    return random_target.random_drafter(plain_target)
