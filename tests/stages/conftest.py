"""What the tests of engines, replay and scoring share: the tiny target and its drafters, loaded once."""

from __future__ import annotations

import pytest

from tests.stages.bench import Bench, build_bench
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(scope="session")
def bench(tiny_drafter: DrafterArtifacts) -> Bench:
    """The tiny target with a trained and an untrained drafter, in memory."""
    return build_bench(tiny_drafter)
