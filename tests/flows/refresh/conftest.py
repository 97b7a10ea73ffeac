"""A model line for each test, in a home with two trained drafters."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.artifacts import committed
from tests.testbed.random_target import random_drafter


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests, since creating one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def home(mlflow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow)
    return tmp_path / "home"


@pytest.fixture
def line() -> str:
    """A new line for each test."""
    return f"line-{secrets.token_hex(4)}"


@pytest.fixture
def drafters(home: Path, plain_target: Target) -> list[Artifact]:
    """Two artifacts of trainings with different drafters."""
    store = Store(home / "store")

    def training(seed: int) -> Artifact:
        made = random_drafter(plain_target, seed)
        return committed(store, "opd", lambda out: save_drafter(made, out / DRAFTER_FOLDER, torch.float32), "ab"[seed])

    return [training(seed) for seed in range(2)]
