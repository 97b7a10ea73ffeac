"""Fixtures of the tests that need SGLang: its interpreter, the served models, and two shared servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from draftsmith.stages.engines.config import OptionValue
from draftsmith.stages.engines.servers.process import free_ports
from tests.sglang_cpu.server import running_server, sglang_python
from tests.testbed.drafter import DrafterArtifacts


@dataclass(frozen=True)
class ServingTarget:
    """The models that a server of the test bed serves, float32."""

    artifact: Path  # of the stage `target`
    model: Path  # transformers model and tokenizer
    drafter: Path  # a trained DFlash checkpoint of block 8, held-out tau about 6


@pytest.fixture(scope="session")
def sglang_env() -> Path:
    """Return the interpreter that has SGLang; without one the test is skipped."""
    found = sglang_python()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(scope="session")
def serving_target(tiny_drafter: DrafterArtifacts) -> ServingTarget:
    """Return the tiny target and its drafter."""
    from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
    from draftsmith.stages.targets.info import model_path

    return ServingTarget(tiny_drafter.target, model_path(tiny_drafter.target), tiny_drafter.drafter / DRAFTER_FOLDER)


@pytest.fixture(scope="session")
def sglang_logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the shared servers' logs, whose ends a failed test shows (tests/integration/conftest.py)."""
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="session")
def plain_url(sglang_env: Path, serving_target: ServingTarget, sglang_logs: Path) -> Iterator[str]:
    """Run a server of the tiny target without a drafter, for all tests that do not change its state."""
    with running_server(sglang_env, serving_target.model, log=sglang_logs / "plain.log") as url:
        yield url


@pytest.fixture(scope="session")
def served_mlflow() -> str:
    """Return the URL at which `dflash_url` looks for MLflow's server, which a test may start there."""
    (port,) = free_ports(1)
    return f"http://127.0.0.1:{port}"


@pytest.fixture(scope="session")
def dflash_url(sglang_env: Path, serving_target: ServingTarget, sglang_logs: Path, served_mlflow: str) -> Iterator[str]:
    """Run a server of the tiny target with its DFlash drafter.

    It logs requests to the folder `requests`, and sums up the verify steps of half of them.
    """
    served = serving_target
    options: dict[str, OptionValue] = {
        "enable-metrics": True,
        "log-requests": True,
        "log-requests-level": 3,
        "log-requests-format": "json",
        "log-requests-target": str(sglang_logs / "requests"),
    }
    environment = {"DRAFTSMITH_TRACE": "0.5", "MLFLOW_TRACKING_URI": served_mlflow}
    with running_server(
        sglang_env,
        served.model,
        served.drafter,
        options=options,
        log=sglang_logs / "dflash.log",
        environment=environment,
    ) as url:
        yield url
