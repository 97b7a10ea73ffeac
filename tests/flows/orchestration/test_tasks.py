"""A process on a cluster's host makes shards for runs of several homes, one after another."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from draftsmith.artifacts.store.mirror import STORE_VARIABLE
from draftsmith.flows.orchestration import tasks

HOME = "DRAFTSMITH_HOME"


@pytest.mark.parametrize("own", [{}, {HOME: "/its/own"}])
def test_a_shard_is_made_in_the_home_of_its_run_or_of_its_host(
    own: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str | None]] = []
    monkeypatch.setenv(HOME, str(tmp_path))
    monkeypatch.delenv(STORE_VARIABLE, raising=False)
    monkeypatch.setattr(tasks, "_HOST_SETTINGS", own)
    monkeypatch.setattr(tasks, "protect_home", lambda *_, **__: None)
    monkeypatch.setattr(
        tasks, "make_shard", lambda _job, home: made.append((str(home), os.environ.get(STORE_VARIABLE)))
    )
    job: Any = SimpleNamespace(config=SimpleNamespace(stages=SimpleNamespace(group_may_read=False)))
    tasks.make_on_host({HOME: "/homes/a", STORE_VARIABLE: "s3://a/store"}, job)
    tasks.make_on_host({HOME: "/homes/b"}, job)
    first, second = (own.get(HOME, home) for home in ("/homes/a", "/homes/b"))
    assert made == [(first, "s3://a/store"), (second, None)]
