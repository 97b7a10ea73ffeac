"""Engines of servers by the kind of their config section: the one place that lists them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx

from draftsmith.stages.engines.config import ServerEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.servers.api import ServerApi
from draftsmith.stages.engines.servers.client import RequestLostError, key_header, unreachable_server
from draftsmith.stages.engines.servers.engine import ServerEngine, open_engine
from draftsmith.stages.engines.servers.requirements import ServerRequirements
from draftsmith.stages.engines.sglang.api import SGLangApi
from draftsmith.stages.engines.sglang.handshake import served_block_size as block_size_of_sglang


def _proceed() -> None:
    """Do nothing: the caller never stops."""


def open_servers(
    config: ServerEngineConfig,
    required: ServerRequirements,
    work: Path,
    log: Callable[[str], None],
    check: Callable[[], None] = _proceed,
) -> AbstractContextManager[ServerEngine]:
    """Open servers of the config's kind, as `open_engine` does."""
    api: ServerApi
    assert isinstance(config, SGLangEngineConfig)
    api = SGLangApi(config, required, log)
    return open_engine(api, config, required, work, log, check)


def identify(url: str, api_key_env: str | None) -> tuple[ServerEngineConfig, int | None]:
    """Return the section of a running server, and the tokens of a verify step that it reports, None if it drafts none.

    Raises RetryableError if it does not answer, DraftsmithError if it is no server of an engine or refuses the key.
    """
    engine = SGLangEngineConfig(kind="sglang", urls=(url,), api_key_env=api_key_env)

    async def ask() -> tuple[ServerEngineConfig, int | None]:
        async with httpx.AsyncClient(headers=key_header(engine.api_key())) as client:
            return engine, await block_size_of_sglang(client, url)

    try:
        return asyncio.run(ask())
    except RequestLostError as error:
        raise unreachable_server(url, error) from error
