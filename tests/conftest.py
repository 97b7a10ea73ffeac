"""Fixtures that several packages share: the shipped tiny target, its prompts and its drafters."""

from __future__ import annotations

import gc
import logging
import os
import tempfile
from pathlib import Path

# Before torch is imported: test workers that take all cores each are several times slower than with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests.testbed import target
from tests.testbed.databases import given_to_new_homes
from tests.testbed.drafter import DrafterArtifacts, drafter_artifacts

# Of properties: a few examples that are the same every time, many by HYPOTHESIS_PROFILE=thorough.
settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", parent=settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# Workers run at the same time as others and as real runs: nobody shares their devices. A measurement of one
# would wait for the stages of all.
_LOCKS = tempfile.TemporaryDirectory(prefix="draftsmith-test-devices-")  # gone with the worker
os.environ["DRAFTSMITH_DEVICE_LOCKS"] = _LOCKS.name

if TYPE_CHECKING:  # most packages need neither
    from collections.abc import Iterator

    from draftsmith.stages.drafters.dflash.model import DFlashDrafter
    from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
    from draftsmith.stages.targets.causal_lm import Target
    from tests.stages.bench import Bench


# Two SGLang servers are there for all of these, if one worker runs them. The last swaps drafters, and swaps them back.
_SHARE_SERVERS = tuple(
    f"tests/integration/test_sglang_{name}.py" for name in ("rollout", "plugin", "watch", "failures", "swap")
)
# These take minutes each.
_LONGEST = (
    "tests/season/test_season.py",
    *_SHARE_SERVERS,
    "tests/stages/runtime/test_ranks.py",
    "tests/flows/orchestration/test_run.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """By file, whose fixtures are then made once."""
    from xdist.scheduler import LoadFileScheduling

    scheduling = LoadFileScheduling(config, log)
    of_file = scheduling._split_scope

    def scope(nodeid: str) -> str:
        file: str = of_file(nodeid)
        return "servers" if file in _SHARE_SERVERS else file

    scheduling._split_scope = scope
    return scheduling


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files start first, so that no worker runs long after the others."""

    def rank(item: pytest.Item) -> tuple[int, bool]:
        file = item.nodeid.partition("::")[0]
        return _LONGEST.index(file) if file in _LONGEST else len(_LONGEST), "integration" not in item.path.parts

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """What is there now stays: modules and tests are no longer looked through."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What was kept is freed at the end, or libraries report it as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def _databases() -> Iterator[None]:
    with given_to_new_homes():
        yield


@pytest.fixture(autouse=True)
def _no_handler_left() -> Iterator[None]:
    """A command that ran in this process writes warnings to the stream of its test, which is closed afterwards."""
    logger = logging.getLogger("draftsmith")
    handlers = list(logger.handlers)
    yield
    logger.handlers = handlers


@pytest.fixture(scope="session")
def tiny_target() -> Path:
    """Folder of the trained 0.82M-parameter target: config, safetensors, tokenizer, chat template."""
    return target.target_folder()


@pytest.fixture(scope="session")
def tiny_prompts() -> Path:
    """JSON Lines of 600 prompts (`messages`, `family`) that the tiny target was not trained on."""
    return target.prompts_file()


@pytest.fixture(scope="session")
def tiny_drafter() -> DrafterArtifacts:
    """Artifacts of target (float32), prompts, rollouts and SFT: a DFlash drafter of block 8, held-out tau about 6."""
    return drafter_artifacts()


@pytest.fixture(scope="session")
def target_with_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifact of the tiny target with the native head that was trained with it."""
    from tests.testbed import native

    return native.target_with_head(tmp_path_factory.mktemp("target-with-head"))


@pytest.fixture(scope="session")
def taken_head(
    target_with_head: Path, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Artifact of stage `sft` that took this head as it is."""
    from tests.testbed import native

    return native.taken_head(tiny_drafter, target_with_head, tmp_path_factory.mktemp("taken-head"))


@pytest.fixture(scope="session")
def bench(tiny_drafter: DrafterArtifacts) -> Bench:
    """The tiny target with a trained and an untrained drafter, in memory."""
    from tests.stages.bench import build_bench

    return build_bench(tiny_drafter)


@pytest.fixture(scope="session")
def plain_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of the stage `target` for a target of seeded random weights, float32: small enough for loops."""
    from tests.testbed import random_target

    return random_target.write_artifact(tmp_path_factory.mktemp("random-target"))


@pytest.fixture(scope="session")
def plain_target(plain_artifact: Path) -> Target:
    """The same, loaded. Not to be changed."""
    from draftsmith.stages.targets.causal_lm import Target

    return Target.load(plain_artifact, device="cpu")


@pytest.fixture(scope="session")
def plain_drafter(plain_target: Target) -> DFlashDrafter:
    """A random drafter for it. Not to be changed."""
    from tests.testbed import random_target

    return random_target.random_drafter(plain_target)


@pytest.fixture(scope="session")
def tiny_eagle3() -> Path:
    """The artifact of SFT for an EAGLE-3 drafter of the tiny target: block 5, 120 draft tokens, trained a little."""
    from tests.testbed.eagle3 import trained_eagle3

    return trained_eagle3()


@pytest.fixture(scope="session")
def plain_eagle3(plain_target: Target) -> Eagle3Drafter:
    """A random EAGLE-3 drafter for the target of random weights. Not to be changed."""
    from tests.testbed.eagle3 import random_eagle3

    return random_eagle3(plain_target)
