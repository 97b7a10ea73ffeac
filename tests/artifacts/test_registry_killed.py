"""A run that is killed while it registers a version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from draftsmith.artifacts.registry import Registry
from draftsmith.artifacts.tracking import Tracking
from tests.artifacts.test_registry import ref

LINE = "tiny-dflash"


class Killed(BaseException):
    """Nothing catches it, as nothing catches a SIGKILL."""


def killed(*_: Any, **__: Any) -> None:
    raise Killed


def test_the_same_command_registers_no_second_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    registry, made = Registry(Tracking(tmp_path / "home")), ref(tmp_path, "a")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(MlflowClient, "set_model_version_tag", killed)  # the first call behind the version's making
        registry.register(LINE, made, {"tau": "2.5"})
    registry.register(LINE, made, {"tau": "2.5"})
    (version,) = registry.versions(LINE)
    assert (version.number, version.content_id, version.tags["tau"]) == (1, made.content_id, "2.5")
