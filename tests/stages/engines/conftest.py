"""Fixtures of the engines' tests: requirements on servers, engines on them, and short time limits for lost ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts import retry
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.engines.config import SGLangEngineConfig, VLLMEngineConfig
from draftsmith.stages.engines.registry import open_servers
from draftsmith.stages.engines.servers import dispatch
from draftsmith.stages.engines.servers.engine import ServerEngine
from draftsmith.stages.engines.servers.requirements import ServerRequirements, server_requirements
from tests.stages.engines.http_server import HttpServer
from tests.stages.engines.stand_ins import EngineOn, Opened, requirements_of, server_of
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_S", 0.02)
    monkeypatch.setattr(dispatch, "_FULL_PAUSE_S", 0.02)
    monkeypatch.setattr(dispatch, "_FAILING_LIMIT_S", 0.3)
    monkeypatch.setattr(dispatch, "_STALLED_LIMIT_S", 0.3)


@pytest.fixture
def plain(tiny_drafter: DrafterArtifacts) -> ServerRequirements:
    """Servers that answer without a drafter."""
    return requirements_of(tiny_drafter, None)


@pytest.fixture
def assisted(tiny_drafter: DrafterArtifacts) -> ServerRequirements:
    """Servers that draft with the tiny target's drafter."""
    return requirements_of(tiny_drafter, tiny_drafter.drafter / DRAFTER_FOLDER)


@pytest.fixture
def opened(tiny_drafter: DrafterArtifacts, tmp_path: Path) -> Opened:
    """Return a function that opens the engine of a config on servers of the tiny target."""

    def of(
        config: dict[str, Any],
        *,
        drafter: Path | None = None,
        log: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
    ) -> AbstractContextManager[ServerEngine]:
        kind = VLLMEngineConfig if config.get("kind") == "vllm" else SGLangEngineConfig
        parsed = kind.model_validate({"kind": "sglang", **config})
        required = server_requirements(parsed, tiny_drafter.target, drafter, DraftingConfig(), 100)
        return open_servers(parsed, required, tmp_path, log, check)

    return of


@pytest.fixture
def engine_on(opened: Opened) -> EngineOn:
    """Return a function that runs a server which meets the requirements, and opens an engine on it.

    config: of the engine. server: arguments of `server_of`.
    """

    @contextmanager
    def of(
        required: ServerRequirements,
        config: dict[str, Any] | None = None,
        *,
        log: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
        **server: Any,
    ) -> Iterator[tuple[HttpServer, ServerEngine]]:
        with server_of(required, **server) as running:
            given = {"urls": [running.url], **(config or {})}
            with opened(given, drafter=required.drafter_folder, log=log, check=check) as engine:
                yield running, engine

    return of
