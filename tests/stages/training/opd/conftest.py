"""The worlds of OPD's tests: of a parallel drafter, and of an autoregressive one."""

from __future__ import annotations

import pytest

from tests.stages.bench import Bench
from tests.stages.training.opd.world import World, make_world


@pytest.fixture(scope="session")
def world(bench: Bench) -> World:
    return make_world(bench, moved_by=0.3)


@pytest.fixture(scope="session")
def eagle_world(eagle_bench: Bench) -> World:
    return make_world(eagle_bench, moved_by=0.05)


@pytest.fixture(params=["world", "eagle_world"])
def any_world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found
